"""Studies: the same training and evaluation for every network, activation and seed of a grid, and what comes of it."""
