// The macros and functions that shared_kernels/ uses, for Metal. Every platform has such a header. MLX and the Metal
// library precede it. rotormlx/kernels/source.py expands the one-word macros itself.

#define DEVICE_FN METAL_FUNC

// Address spaces, written before the type that a pointer points to.
#define THREAD thread
#define THREADGROUP threadgroup
#define GLOBAL device

// Written before a table at program scope.
#define CONSTANT constant

DEVICE_FN float float_of_bits(uint bits) { return as_type<float>(bits); }
DEVICE_FN uint bits_of_float(float x) { return as_type<uint>(x); }
DEVICE_FN half half_of_bits(ushort bits) { return as_type<half>(bits); }

// The x of the lane whose number differs in the bits of `mask`. All lanes of a simdgroup must call it together.
DEVICE_FN float shuffle_xor(float x, ushort mask) { return simd_shuffle_xor(x, mask); }
DEVICE_FN uint shuffle_xor(uint x, ushort mask) { return simd_shuffle_xor(x, mask); }

// A barrier for all threads of a threadgroup, after which they see each other's writes to threadgroup memory.
#define MEET() threadgroup_barrier(mem_flags::mem_threadgroup)

// A barrier for the lanes of a simdgroup, after which they see each other's writes to threadgroup memory.
#define MEET_LANES() simdgroup_barrier(mem_flags::mem_threadgroup)

// Written before a loop whose arrays must stay in registers.
#define UNROLL _Pragma("clang loop unroll(full)")
