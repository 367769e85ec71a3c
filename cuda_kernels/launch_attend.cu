// Launchers of the attention kernels.
#include "codecs.cuh"
#include "fragments.cuh"

#include "attend.cu"
#include "attend_merge.cu"
#include "attend_plain.cu"
#include "attend_query.cu"
#include "attend_alone.cu"

namespace {

constexpr int ATTEND_THREADS = 128;
constexpr int ROW_THREADS = 128;

template <int TILES>
using Packed = AttendPacked<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, TILES>;
template <int ROWS>
using Plain = AttendPlain<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, ROWS>;

// Whether a thread of attend<1> fits into 168 registers without spilling, so that a multiprocessor has room for three
// thread blocks. Plans assume three.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool NARROW = KEY_BITS < 8 && VALUE_BITS < 8;
#else
constexpr bool NARROW = true;
#endif
constexpr bool ROOM_FOR_THREE = NARROW && KEY_DIM <= 128 && VALUE_DIM <= 128;

// Whether a thread block can rotate rows, and rotate them back, by itself.
constexpr bool HAS_STAGES = key_rotation::HAS_STAGES && value_rotation::HAS_STAGES;

// With counters this kernel does the whole call: see one_kernel of cuda_plan.py. The launch bounds tell the compiler
// how many thread blocks a multiprocessor must have room for.
template <int TILES>
__global__ void __launch_bounds__(ATTEND_THREADS, TILES == 1 && ROOM_FOR_THREE ? 3 : 2)
attend(const __grid_constant__ AttendParts all) {
  extern __shared__ uint4 shared[];
  constexpr int ROWS = 8 * TILES;
  if (int(blockIdx.z) < all.exact_parts) {
    Plain<ROWS>::template run_part<true>(all, reinterpret_cast<float*>(shared));
  } else {
    Packed<TILES>::run(all, shared, [&](const Part& p, float* room) -> const float* {
      if constexpr (HAS_STAGES) {
        if (all.call.counters != nullptr) {
          rotate_queries_of<KeyCodec, ROWS, ATTEND_THREADS>(all, p, room);
          __syncthreads();  // the rotated queries are there
          return room;
        }
      }
      return Packed<TILES>::rotated_before(all, p);
    });
  }
  if constexpr (HAS_STAGES) {
    static_assert(4 * LastMergeShape<VALUE_DIM, ROWS, ATTEND_THREADS>::ALL <= Packed<TILES>::Shape::SHARED_BYTES,
                  "a part takes as much shared memory as its merge");
    if (all.call.counters != nullptr) {
      merge_if_last<ValueCodec, ROWS, ATTEND_THREADS>(all, reinterpret_cast<float*>(shared));
    }
  }
}

__global__ void __launch_bounds__(ATTEND_THREADS) attend_float(const __grid_constant__ AttendParts all) {
  extern __shared__ uint4 shared[];
  Plain<8>::run(all, reinterpret_cast<float*>(shared));
}

template <int ROWS>
__global__ void __launch_bounds__(ROW_THREADS) attend_query(const __grid_constant__ AttendParts all) {
  extern __shared__ uint4 shared[];
  rotate_queries<KEY_DIM, ROWS, ROW_THREADS>(all, reinterpret_cast<float*>(shared));
}

template <int ROWS>
__global__ void __launch_bounds__(ROW_THREADS) attend_merge(const __grid_constant__ AttendParts all) {
  extern __shared__ uint4 shared[];
  merge_parts<VALUE_DIM, ROWS, ROW_THREADS>(all, reinterpret_cast<float*>(shared));
}

// Shared memory of attend<tiles>, or of attend_float if `tiles` is 0.
int shared_bytes(int tiles) {
  using Small = AttendShape<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, 1>;
  using Large = AttendShape<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, 2>;
  if (tiles == 0) return Plain<8>::SHARED_BYTES;
  return tiles == 1 ? max(int(Small::SHARED_BYTES), int(Plain<8>::SHARED_BYTES))
                    : max(int(Large::SHARED_BYTES), int(Plain<16>::SHARED_BYTES));
}

// Whether the parts hold all tokens and none of them is empty.
bool covers(int parts, int part_tokens, int tokens) {
  if (tokens == 0) return parts == 0;
  return parts > 0 && part_tokens > 0 && part_tokens % 32 == 0 &&
         parts == ceil_divide(tokens, part_tokens);
}

// Whether a plan fits this call and the kernels of this file.
template <int ROWS>
bool fits(const rotormlx_attend_plan& plan, const rotormlx_attend_arguments& call, int group_rows) {
  const int most_operands = call.dtype == ROTORMLX_FLOAT32 ? 0 : 2;
  return plan.operands >= 0 && plan.operands <= most_operands &&
         plan.tiles == ceil_divide(group_rows, 8 * max(plan.operands, 1)) &&
         plan.one_kernel >= 0 && plan.one_kernel <= (HAS_STAGES && plan.operands > 0 ? 1 : 0) &&
         covers(plan.exact_parts, plan.exact_part_tokens, call.exact_tokens) &&
         covers(plan.packed_parts, plan.packed_part_tokens, call.packed_tokens) &&
         plan.packed_part_tokens % BLOCK == 0 && plan.exact_parts + plan.packed_parts <= MAX_PARTS &&
         plan.query_bytes == 4 * int(QueryShape<KEY_DIM, ROWS, ROW_THREADS>::ALL) &&
         plan.part_bytes == shared_bytes(plan.operands) &&
         plan.merge_bytes == 4 * int(MergeShape<VALUE_DIM, ROWS, ROW_THREADS>::ALL);
}

int launch_parts(const rotormlx_attend_plan& plan, dim3 grid, void* stream, const AttendParts& all) {
  if (plan.operands == 2) return launch(attend<2>, grid, ATTEND_THREADS, plan.part_bytes, stream, all);
  if (plan.operands == 1) return launch(attend<1>, grid, ATTEND_THREADS, plan.part_bytes, stream, all);
  return launch(attend_float, grid, ATTEND_THREADS, plan.part_bytes, stream, all);
}

// ROWS: query rows of a thread block that multiplies by a matrix. Many rows share each read of the matrix; with few
// rows, more thread blocks work in parallel.
template <int ROWS>
int launch_all(const rotormlx_attend_arguments& call, const rotormlx_attend_plan& plan, void* stream) {
  const int heads = call.batch * call.kv_heads, group_rows = call.heads / call.kv_heads * call.length;
  if (!fits<ROWS>(plan, call, group_rows)) return int(cudaErrorInvalidValue);
  const int parts = plan.exact_parts + plan.packed_parts;
  const int64_t query_rows = int64_t(heads) * group_rows;
  AttendParts all;
  all.call = call;
  if (plan.one_kernel == 0 || parts == 0) all.call.counters = nullptr;
  all.exact_parts = plan.exact_parts;
  all.exact_part_tokens = plan.exact_part_tokens;
  all.packed_parts = plan.packed_parts;
  all.packed_part_tokens = plan.packed_part_tokens;
  all.rotated = static_cast<float*>(call.workspace);
  all.outputs = all.rotated + query_rows * KEY_DIM;  // on a multiple of 16 bytes
  all.tops = all.outputs + query_rows * parts * VALUE_DIM;
  all.totals = all.tops + query_rows * parts;

  const dim3 grid(plan.tiles, heads, parts);
  if (all.call.counters != nullptr) return launch_parts(plan, grid, stream, all);
  const dim3 row_grid(ceil_divide(group_rows, ROWS), heads);
  int error = 0;
  if (plan.packed_parts > 0) {
    error = launch(attend_query<ROWS>, row_grid, ROW_THREADS, plan.query_bytes, stream, all);
  }
  if (error == 0 && parts > 0) error = launch_parts(plan, grid, stream, all);
  if (error != 0) return error;
  return launch(attend_merge<ROWS>, row_grid, ROW_THREADS, plan.merge_bytes, stream, all);
}

}  // namespace

size_t rotormlx_attend_workspace(const rotormlx_attend_arguments* arguments, const rotormlx_attend_plan* plan) {
  const size_t parts = plan->exact_parts + plan->packed_parts;
  const size_t query_rows = size_t(arguments->batch) * arguments->heads * arguments->length;
  return 4 * query_rows * (KEY_DIM + parts * (VALUE_DIM + 2));
}

int rotormlx_attend(const rotormlx_attend_arguments* arguments, const rotormlx_attend_plan* plan, void* stream) {
  if (plan->matrix_rows == 8) return launch_all<8>(*arguments, *plan, stream);
  if (plan->matrix_rows == 1) return launch_all<1>(*arguments, *plan, stream);
  return int(cudaErrorInvalidValue);
}
