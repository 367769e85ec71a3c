"""Python access to the sources of the kernels and to the CPU library; imports no MLX."""
