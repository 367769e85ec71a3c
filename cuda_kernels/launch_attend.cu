// Launchers of the kernels of attention.
#include "launch.cuh"

#include "fragments.cuh"

#include "attend.cu"
#include "attend_merge.cu"
#include "attend_plain.cu"
#include "attend_query.cu"

namespace {

constexpr int ATTEND_THREADS = 128;
constexpr int STEP = 4 * BLOCK;
constexpr int MAX_PARTS = 256;
constexpr int ROW_THREADS = 128;

template <int TILES>
using Packed = AttendPacked<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, TILES>;
template <int ROWS>
using Plain = AttendPlain<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, ROWS>;

// Two thread blocks a multiprocessor at least; without that word the compiler for sm_80 spills to make room for three.
template <int TILES>
__global__ void __launch_bounds__(ATTEND_THREADS, 2) attend(const __grid_constant__ AttendParts all) {
  extern __shared__ uint4 shared[];
  if (int(blockIdx.y) < all.packed_parts) {
    Packed<TILES>::run(all, shared);
  } else {
    Plain<8 * TILES>::run(all, reinterpret_cast<float*>(shared));
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
Cut cut(int tokens, int limit) {
  const int steps = ceil_divide(tokens, STEP);
  if (steps == 0) return {0, 0};
  const int steps_a_part = ceil_divide(steps, limit);
  return {ceil_divide(steps, steps_a_part), steps_a_part * STEP};
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
  // As many thread blocks as run at once: parts are equal, so none is left for a second round.
  const int at_once = plan.operands == 2 ? 2 : 3;
  const int limit =
      at_once * device_number(cudaDevAttrMultiProcessorCount, 1) / (plan.heads * plan.tiles);
  const Cut packed = cut(call.packed_tokens, min(max(limit, 1), MAX_PARTS));
  const Cut exact = cut(call.exact_tokens, min(max(limit, 1), MAX_PARTS));
  plan.all.packed_parts = packed.number;
  plan.all.packed_part_tokens = packed.tokens;
  plan.all.exact_parts = exact.number;
  plan.all.exact_part_tokens = exact.tokens;
  return plan;
}

size_t workspace_floats(const AttendPlan& plan) {
  const size_t parts = plan.all.packed_parts + plan.all.exact_parts;
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
  const int parts = all.packed_parts + all.exact_parts;
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
    error = together == 1 ? launch(attend_query<1>, row_grid, ROW_THREADS, 4 * KEY_DIM, stream, all)
                          : launch(attend_query<8>, row_grid, ROW_THREADS, 32 * KEY_DIM, stream, all);
  }
  const dim3 grid(plan.tiles, parts, plan.heads);
  if (error == 0 && parts > 0) error = launch_parts(plan, grid, stream);
  if (error != 0) return error;
  return together == 1 ? launch(attend_merge<1>, row_grid, ROW_THREADS, 4 * VALUE_DIM, stream, all)
                       : launch(attend_merge<8>, row_grid, ROW_THREADS, 32 * VALUE_DIM, stream, all);
}
