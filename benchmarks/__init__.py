"""Measurements; each script says what it measures and writes what it measured to `benchmarks/results/`."""
