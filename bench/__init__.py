"""Benchmarks: `make bench` times every row of `bench.table` and writes bench/results."""
