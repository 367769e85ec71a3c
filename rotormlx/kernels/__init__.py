"""What Python needs of the kernels' texts and of the CPU library; imports no MLX."""
