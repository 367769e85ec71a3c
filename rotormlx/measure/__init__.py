"""Measurements: quality, speed and memory of compressed caches and of their rivals."""
