"""Questions asked of trained networks: each file one, each answer plain numbers that models/figures draws."""
