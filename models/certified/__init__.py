"""Bounds that are proved: of what a network computes, how fast it changes, and what no attack can change."""
