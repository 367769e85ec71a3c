"""The package's MLX side: backends, caches and what is built into mlx-lm."""
