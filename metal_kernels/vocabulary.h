// The words in which shared_kernels/ is written, for Metal. Every platform has such a header. MLX and the
// Metal library stand before it; kernel_source.py puts the one-word macros in place itself.

#define DEVICE_FN METAL_FUNC

// Address spaces, before the type that a pointer points to.
#define THREAD thread
#define THREADGROUP threadgroup
#define GLOBAL device

// Before a table at program scope.
#define CONSTANT constant

DEVICE_FN float float_of_bits(uint bits) { return as_type<float>(bits); }
DEVICE_FN uint bits_of_float(float x) { return as_type<uint>(x); }
DEVICE_FN half half_of_bits(ushort bits) { return as_type<half>(bits); }

// What the lane whose number differs by the bits of `mask` brings; all lanes of a simdgroup meet here.
DEVICE_FN float shuffle_xor(float x, ushort mask) { return simd_shuffle_xor(x, mask); }
DEVICE_FN uint shuffle_xor(uint x, ushort mask) { return simd_shuffle_xor(x, mask); }

// All threads of a threadgroup meet here, and see what the others wrote to threadgroup memory.
#define MEET() threadgroup_barrier(mem_flags::mem_threadgroup)

// The lanes of a simdgroup meet here, and see what the others wrote to threadgroup memory.
#define MEET_LANES() simdgroup_barrier(mem_flags::mem_threadgroup)

// Before a loop whose arrays must lie in registers.
#define UNROLL _Pragma("clang loop unroll(full)")
