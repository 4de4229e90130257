"""Figures, each drawn from plain numbers and returned as PNG bytes."""
