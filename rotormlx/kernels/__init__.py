"""The sources of the kernels and the CPU library, as Python uses them; imports no MLX."""
