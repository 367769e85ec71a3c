// Stands before MLX's header of this name, which gives Metal the math functions for bfloat that
// its library lacks. Here math.h has them.
