"""Networks, data, attacks and training that use kafops: `python -m models --help`, run from a clone."""
