// Precedes every Metal kernel, as Metal's library and MLX's own header do on a device.
#pragma once

#include "entry.h"
#include "simdgroup_matrix.h"

#define __METAL__ 1

// Address spaces mean nothing here: the lint checks them.
#define device
#define constant
#define threadgroup
#define thread
#define kernel

#include "mlx/backend/metal/kernels/utils.h"
