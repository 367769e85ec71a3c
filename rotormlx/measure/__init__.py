"""Measurements: quality, speed and memory of compressed caches and of the baselines."""
