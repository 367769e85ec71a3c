// The library's functions, called by rotormlx/kernels/cpu_library.py with arrays as DLPack describes them.

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <vector>

#include "pool.h"
#include "problem.h"

namespace rotormlx {

#define DECLARE(name)                    \
  extern const CodecKernels codec_##name; \
  extern const AttendKernels attend_##name;
DECLARE(baseline)
#ifdef WITH_AVX2
DECLARE(avx2)
#endif
#ifdef WITH_AVX512
DECLARE(avx512)
#endif

namespace {

struct Variant {
  const char* name;
  const CodecKernels* codec;
  const AttendKernels* attend;
};

// The variants that this processor can run, best first.
const std::vector<Variant>& variants() {
  static const std::vector<Variant> found = [] {
    std::vector<Variant> list;
#ifdef WITH_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      list.push_back({"avx512", &codec_avx512, &attend_avx512});
    }
#endif
#ifdef WITH_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      list.push_back({"avx2", &codec_avx2, &attend_avx2});
    }
#endif
    list.push_back({"baseline", &codec_baseline, &attend_baseline});
    return list;
  }();
  return found;
}

const Variant& variant_of(int64_t index) {
  if (index < 0 || index >= (int64_t)variants().size()) throw std::invalid_argument("there is no such variant");
  return variants()[index];
}

// A thread's memory, which grows as needed and is kept.
class Workspace {
 public:
  ~Workspace() { std::free(memory_); }
  float* floats(int64_t count) {
    if (count > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = (float*)std::aligned_alloc(64, (sizeof(float) * count + 63) / 64 * 64);
      if (!memory_) throw std::bad_alloc();
      size_ = count;
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  int64_t size_ = 0;
};

// Memory of a call: what its tasks share, then scratch for each of its threads. Tasks allocate nothing.
thread_local Workspace workspace;

// Floats of scratch for one thread, in whole cache lines.
int64_t in_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// ---- arrays -----------------------------------------------------------------------------------------

Type type_of(const Array& a) {
  if (a.kind == 2 && a.bits == 32) return Type::float32;
  if (a.kind == 2 && a.bits == 16) return Type::float16;
  if (a.kind == 4 && a.bits == 16) return Type::bfloat16;
  if (a.kind == 6 && a.bits == 8) return Type::boolean;
  return Type::none;  // words, read by their role
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// With fewer dimensions than `ndim`, the first ones have stride 0, and so have those of size 1.
Tensor tensor_of(const Array* a, int ndim) {
  Tensor t;
  if (!a) return t;
  require(a->device_type == 1 || a->device_type == 8, "arrays must lie in the memory of the CPU");
  require(a->ndim <= ndim, "an array has too many dimensions");
  t.data = (char*)a->data + a->byte_offset;
  t.type = type_of(*a);
  int64_t dense = 1;
  for (int i = a->ndim; i-- > 0;) {
    const int64_t stride = a->strides ? a->strides[i] : dense;
    t.strides[ndim - a->ndim + i] = a->shape[i] == 1 ? 0 : stride;
    dense *= a->shape[i];
  }
  return t;
}

bool is_float(Type type) {
  return type == Type::float32 || type == Type::float16 || type == Type::bfloat16;
}

Blocks blocks_of(const Packed& p, const Coding& coding) {
  Blocks b;
  b.words = tensor_of(p.words, 5);
  b.scales = tensor_of(p.scales, 4);
  b.centres = tensor_of(p.centres, 4);
  b.channel_scale = tensor_of(p.channel_scale, 3);
  b.rotation = coding.rotation;
  b.bits = coding.bits;
  b.head_dim = coding.rotation->head_dim;
  b.is_key = coding.is_key;
  require(b.head_dim >= 8 && b.head_dim <= MAX_DIM && b.head_dim % 8 == 0, "head_dim is out of range");
  require(b.bits == 2 || b.bits == 3 || b.bits == 4 || b.bits == 8, "bits must be 2, 3, 4 or 8");
  return b;
}

int64_t shape_of(const Array* a, int i) { return a->shape[i]; }

int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// So few numbers are prepared, merged, encoded or decoded sooner than another thread wakes.
bool few(int64_t numbers) { return numbers <= 1 << 15; }

// The number of threads that this many tasks can keep busy, at least one.
int64_t threads_of(int64_t wanted, int64_t tasks) {
  return std::max<int64_t>(1, std::min({wanted, tasks, MAX_THREADS}));
}

// ---- rows to blocks and back ------------------------------------------------------------------------

template <typename Run>
void codec_call(const CodecCall& call, Run run) {
  Codec codec;
  codec.rows = tensor_of(call.rows, 4);
  codec.blocks = blocks_of(call.packed, call.coding);
  codec.kv_heads = shape_of(call.rows, 1);
  codec.block_count = shape_of(call.rows, 2) / BLOCK;
  codec.given_centres = call.given_centres;
  codec.state = tensor_of(call.state, 4);
  codec.start = call.start;
  require(is_float(codec.rows.type), "rows must be float16, bfloat16 or float32");
  const CodecKernels& kernels = *variant_of(call.variant).codec;
  const int64_t heads = shape_of(call.rows, 0) * codec.kv_heads, tasks = heads * codec.block_count;
  const int64_t threads = few(tasks * BLOCK * codec.blocks.head_dim) ? 1 : threads_of(call.threads, tasks);
  const int64_t floats = in_lines(kernels.scratch(codec));
  float* scratch = workspace.floats(threads * floats);
  run_tasks(tasks, threads, [&](int64_t i, int64_t place) {
    run(kernels, codec, i / codec.block_count, i % codec.block_count, scratch + place * floats);
  });
}

// ---- attention --------------------------------------------------------------------------------------

// Query rows of a task, so that what is prepared of a block serves many of them; tasks that keep a large machine
// busy; and the least blocks of a part, so that merging stays cheap. An exact block takes twice as long as a packed
// one.
enum { CHUNK_ROWS = 64, TASKS = 64, PART_BLOCKS = 4, EXACT_PART_BLOCKS = 2 };

void attend_call(const AttendCall& call) {
  Attend a;
  a.queries = tensor_of(call.queries, 4);
  a.output = tensor_of(call.output, 4);
  a.output.type = a.queries.type;
  a.key_exact = tensor_of(call.keys.exact, 4);
  a.value_exact = tensor_of(call.values.exact, 4);
  a.mask = tensor_of(call.mask, 4);
  a.sink_logits = tensor_of(call.sink_logits, 1);
  a.keys = blocks_of(call.keys.packed, call.keys.coding);
  a.values = blocks_of(call.values.packed, call.values.coding);
  a.lengths = call.lengths();
  a.sink = call.sink;
  a.causal = call.causal;
  a.scale = (float)call.scale;
  for (Type type : {a.queries.type, a.key_exact.type, a.value_exact.type}) {
    require(is_float(type), "queries, keys and values must be float16, bfloat16 or float32");
  }
  require(!a.mask.data || a.mask.type != Type::none, "a mask must be boolean or floating");
  require(!a.sink_logits.data || is_float(a.sink_logits.type), "sink logits must be floating");
  for (int i = 0; i < 4; ++i) {
    if (shape_of(call.output, i) == 0) return;  // the output is empty
  }
  const int64_t batch = shape_of(call.queries, 0);
  a.kv_heads = shape_of(call.keys.exact, 1);
  require(a.kv_heads > 0, "queries need at least one KV head");
  a.repeats = shape_of(call.queries, 1) / a.kv_heads;
  a.length = shape_of(call.queries, 2);
  a.rows = a.repeats * a.length;

  int64_t packed = 0, exact = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t row_packed = a.lengths[2 * b], row_exact = a.lengths[2 * b + 1] - row_packed;
    packed = row_packed > packed ? row_packed : packed;
    exact = row_exact > exact ? row_exact : exact;
  }
  require(packed == 0 || (a.keys.words.data && a.values.words.data), "packed tokens must have blocks");
  const auto side_by_side = [](const Blocks& blocks, const Array* words) {
    const int64_t lanes = blocks.is_key ? BLOCK : blocks.head_dim;
    // Keys of 16 channels at 2 bits have one row of words, which has no stride.
    return blocks.words.strides[4] == 1 && (blocks.words.strides[3] == lanes || shape_of(words, 3) == 1);
  };
  require(
      packed == 0 ||
          (side_by_side(a.keys, call.keys.packed.words) && side_by_side(a.values, call.values.packed.words)),
      "the words of a block must lie side by side");

  const int64_t heads = batch * a.kv_heads;
  a.chunks = divided_up(a.rows, CHUNK_ROWS);
  a.chunk_rows = divided_up(a.rows, a.chunks);
  a.chunks = divided_up(a.rows, a.chunk_rows);
  const int64_t most_parts = divided_up(TASKS, heads * a.chunks);
  const auto cut = [&](int64_t tokens, int64_t least, int64_t& parts, int64_t& part_blocks) {
    const int64_t blocks = divided_up(tokens, BLOCK), share = divided_up(blocks, most_parts);
    part_blocks = share > least ? share : least;
    parts = divided_up(blocks, part_blocks);
  };
  cut(packed, PART_BLOCKS, a.packed_parts, a.packed_part_blocks);
  cut(exact, EXACT_PART_BLOCKS, a.exact_parts, a.exact_part_blocks);

  a.key_pitch = divided_up(a.keys.head_dim, 16) * 16;
  a.value_pitch = divided_up(a.values.head_dim, 16) * 16;
  const int64_t query_floats = heads * a.rows * a.key_pitch;
  const int64_t tasks = heads * a.chunks * a.parts(), task_rows = tasks * a.chunk_rows;
  const AttendKernels& kernels = *variant_of(call.variant).attend;
  const int64_t floats = in_lines(kernels.scratch(a)), chunk_tasks = heads * a.chunks;
  const int64_t threads = threads_of(call.threads, std::max(tasks, chunk_tasks));
  const int64_t chunk_threads = few(query_floats) ? 1 : threads;
  const int64_t shared = in_lines(3 * query_floats + task_rows * (2 + a.value_pitch) + heads * a.rows);
  float* memory = workspace.floats(shared + threads * floats);
  float* scratch = memory + shared;
  for (float** p : {&a.plain, &a.by_word, &a.by_four}) {
    *p = memory;
    memory += query_floats;
  }
  a.sums = memory;
  a.tops = a.sums + task_rows * a.value_pitch;
  a.totals = a.tops + task_rows;
  a.noise = a.totals + task_rows;

  run_tasks(chunk_tasks, chunk_threads, [&](int64_t i, int64_t place) {
    kernels.prepare(a, i / a.chunks, i % a.chunks, scratch + place * floats);
  });
  run_tasks(tasks, threads, [&](int64_t i, int64_t place) {
    const int64_t chunk = i / a.parts(), part = (i + a.packed_parts) % a.parts();
    kernels.part(a, chunk / a.chunks, chunk % a.chunks, part, scratch + place * floats);
  });
  run_tasks(chunk_tasks, chunk_threads, [&](int64_t i, int64_t place) {
    kernels.merge(a, i / a.chunks, i % a.chunks, scratch + place * floats);
  });
}

// Null, or the message of an error.
template <typename Call>
const char* guarded(Call call) {
  try {
    call();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    thread_local char message[128];
    std::size_t i = 0;
    for (const char* c = error.what(); *c && i + 1 < sizeof message; ++c) message[i++] = *c;
    message[i] = 0;
    return message;
  } catch (const std::bad_alloc&) {
    return "there is not enough memory";
  } catch (const std::exception&) {
    return "the system refused a lock";
  }
}

}  // namespace
}  // namespace rotormlx

#define EXPORT extern "C" __attribute__((visibility("default")))

// Must agree with rotormlx/kernels/cpu_library.py.
EXPORT int64_t rotormlx_interface_version() { return 5; }

// Announce that a call with this many threads is about to come.
EXPORT const char* rotormlx_announce(int64_t threads) {
  return rotormlx::guarded([&] { rotormlx::announce_tasks(threads); });
}

// The name of variant `index`, best first; null past the last.
EXPORT const char* rotormlx_variant(int64_t index) {
  const auto& list = rotormlx::variants();
  return index < (int64_t)list.size() ? list[index].name : nullptr;
}

EXPORT const char* rotormlx_encode(const rotormlx::CodecCall* call) {
  return rotormlx::guarded([&] {
    rotormlx::codec_call(*call, [](const auto& kernels, const auto&... task) { kernels.encode(task...); });
  });
}

EXPORT const char* rotormlx_decode(const rotormlx::CodecCall* call) {
  return rotormlx::guarded([&] {
    rotormlx::codec_call(*call, [](const auto& kernels, const auto&... task) { kernels.decode(task...); });
  });
}

EXPORT const char* rotormlx_attend(const rotormlx::AttendCall* call) {
  return rotormlx::guarded([&] { rotormlx::attend_call(*call); });
}
