// Stands before MLX's header of this name: kernels do not log.
