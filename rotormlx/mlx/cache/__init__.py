"""Compressed caches for mlx-lm."""
