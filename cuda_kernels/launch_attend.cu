// Launchers of the kernels of attention.
#include "launch.cuh"

#include "fragments.cuh"

#include "attend.cu"
#include "attend_merge.cu"
#include "attend_plain.cu"
#include "attend_query.cu"

namespace {

constexpr int ATTEND_THREADS = 128;
// Parts are whole steps: a block for each warp of packed tokens; of exact ones, which take longer, what a warp takes.
constexpr int PACKED_STEP = 4 * BLOCK, EXACT_STEP = 32;
constexpr int ROW_THREADS = 128;

template <int TILES>
using Packed = AttendPacked<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, TILES>;
template <int ROWS>
using Plain = AttendPlain<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, ROWS>;

// Two thread blocks a multiprocessor at least; without that word the compiler for sm_80 spills to make room for three.
template <int TILES>
__global__ void __launch_bounds__(ATTEND_THREADS, 2) attend(const __grid_constant__ AttendParts all) {
  extern __shared__ uint4 shared[];
  if (int(blockIdx.z) < all.exact_parts) {
    Plain<8 * TILES>::template run_part<true>(all, reinterpret_cast<float*>(shared));
  } else {
    Packed<TILES>::run(all, shared);
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

// What the current device says, or `otherwise`.
int device_number(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, number = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&number, attribute, device) != cudaSuccess) {
    return otherwise;
  }
  return number;
}

// Shared memory of attend<TILES>; of attend_float for none.
int shared_bytes(int tiles) {
  using Small = AttendShape<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, 1>;
  using Large = AttendShape<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, 2>;
  if (tiles == 0) return Plain<8>::SHARED_BYTES;
  return tiles == 1 ? max(int(Small::SHARED_BYTES), int(Plain<8>::SHARED_BYTES))
                    : max(int(Large::SHARED_BYTES), int(Plain<16>::SHARED_BYTES));
}

struct Cut {
  int number, tokens;
};

// At most `limit` parts, each of as many whole steps as the others.
Cut cut(int tokens, int step, int limit) {
  const int steps = ceil_divide(tokens, step);
  if (steps == 0) return {0, 0};
  const int steps_a_part = ceil_divide(steps, limit);
  return {ceil_divide(steps, steps_a_part), steps_a_part * step};
}

struct Cuts {
  Cut exact, packed;
};

// Parts of both kinds, of which `limit` run at once. Exact parts begin first. Where they are short beside the packed ones, those
// take as many thread blocks as if there were no others, and some of them begin when the exact ones have ended.
Cuts cut_both(int exact_tokens, int packed_tokens, int limit) {
  const int64_t exact_cost = int64_t(exact_tokens) * 4;  // of one token that of four packed ones, about as its bytes
  const int exact_limit = int(limit * exact_cost / max(exact_cost + packed_tokens, int64_t(1)));
  const Cut exact = cut(exact_tokens, EXACT_STEP, max(exact_limit, 1));
  const Cut beside = cut(packed_tokens, PACKED_STEP, max(limit - exact.number, 1));
  const Cut after = cut(packed_tokens, PACKED_STEP, limit);
  return {exact, beside.tokens <= after.tokens + int64_t(exact.tokens) * 4 ? beside : after};
}

// How a call is spread over thread blocks.
struct AttendPlan {
  int operands;          // of 8 query rows each in a thread block of attend; 0: attend_float takes 8
  int rows;              // query rows of a thread block
  int tiles, heads;      // tiles of rows of a KV head, and B K
  int64_t query_rows;    // of all KV heads
  AttendParts all;       // without pointers to the workspace
};

AttendPlan plan_attend(const rotormlx_attend_arguments& call) {
  AttendPlan plan;
  plan.all.call = call;
  const int group_rows = call.heads / call.kv_heads * call.length;
  plan.operands = call.dtype == ROTORMLX_FLOAT32 ? 0 : group_rows <= 8 ? 1 : 2;
  // Some devices have less shared memory than the widest codes and longest vectors take.
  const int most_bytes = device_number(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 * 1024);
  while (plan.operands > 0 && shared_bytes(plan.operands) > most_bytes) --plan.operands;
  plan.rows = 8 * max(plan.operands, 1);
  plan.tiles = ceil_divide(group_rows, plan.rows);
  plan.heads = call.batch * call.kv_heads;
  plan.query_rows = int64_t(plan.heads) * group_rows;
  const int at_once = plan.operands == 2 ? 2 : 3;  // thread blocks of a multiprocessor
  const int limit =
      at_once * device_number(cudaDevAttrMultiProcessorCount, 1) / (plan.heads * plan.tiles);
  const Cuts cuts = cut_both(call.exact_tokens, call.packed_tokens, min(max(limit, 1), MAX_PARTS / 2));
  plan.all.exact_parts = cuts.exact.number;
  plan.all.exact_part_tokens = cuts.exact.tokens;
  plan.all.packed_parts = cuts.packed.number;
  plan.all.packed_part_tokens = cuts.packed.tokens;
  return plan;
}

size_t workspace_floats(const AttendPlan& plan) {
  const size_t parts = plan.all.exact_parts + plan.all.packed_parts;
  return size_t(plan.query_rows) * (KEY_DIM + parts * (VALUE_DIM + 2));
}

int launch_parts(const AttendPlan& plan, dim3 grid, void* stream) {
  const int bytes = shared_bytes(plan.operands);
  if (plan.operands == 2) return launch(attend<2>, grid, ATTEND_THREADS, bytes, stream, plan.all);
  if (plan.operands == 1) return launch(attend<1>, grid, ATTEND_THREADS, bytes, stream, plan.all);
  return launch(attend_float, grid, ATTEND_THREADS, bytes, stream, plan.all);
}

}  // namespace

size_t rotormlx_attend_workspace(const rotormlx_attend_arguments* arguments) {
  return 4 * workspace_floats(plan_attend(*arguments));
}

int rotormlx_attend(const rotormlx_attend_arguments* arguments, void* stream) {
  AttendPlan plan = plan_attend(*arguments);
  AttendParts& all = plan.all;
  const int parts = all.exact_parts + all.packed_parts;
  all.rotated = static_cast<float*>(arguments->workspace);
  all.tops = all.rotated + plan.query_rows * KEY_DIM;
  all.totals = all.tops + plan.query_rows * parts;
  all.outputs = all.totals + plan.query_rows * parts;

  // Many rows share what they read of a matrix; few are done at once.
  const int together = plan.query_rows >= 2048 ? 8 : 1;
  const int group_rows = int(plan.query_rows / plan.heads);
  const dim3 row_grid(ceil_divide(group_rows, together), plan.heads);
  int error = 0;
  if (all.packed_parts > 0) {
    using Few = QueryShape<KEY_DIM, 1, ROW_THREADS>;
    using Many = QueryShape<KEY_DIM, 8, ROW_THREADS>;
    error = together == 1 ? launch(attend_query<1>, row_grid, ROW_THREADS, 4 * Few::ALL, stream, all)
                          : launch(attend_query<8>, row_grid, ROW_THREADS, 4 * Many::ALL, stream, all);
  }
  const dim3 grid(plan.tiles, plan.heads, parts);
  if (error == 0 && parts > 0) error = launch_parts(plan, grid, stream);
  if (error != 0) return error;
  using Few = MergeShape<VALUE_DIM, 1, ROW_THREADS>;
  using Many = MergeShape<VALUE_DIM, 8, ROW_THREADS>;
  return together == 1 ? launch(attend_merge<1>, row_grid, ROW_THREADS, 4 * Few::ALL, stream, all)
                       : launch(attend_merge<8>, row_grid, ROW_THREADS, 4 * Many::ALL, stream, all);
}
