// Attention on packed bytes (docs/FORMAT.md, section 7). The query is rotated once, levels are looked up in registers
// for all query rows of a tile, and the output is rotated back once.
//
// One inner loop, add(), serves keys and values, both packed and exact. A vector holds neighbouring lanes (tokens for
// keys, channels for values); the loop walks the axis that is summed over.

#include <utility>

#include "rows.h"

namespace {

using rotormlx::Attend;
using rotormlx::Blocks;

// Query rows of a tile, whose sums stay in registers.
#ifndef MAX_ROWS
#define MAX_ROWS 8
#endif

enum { EXACT = 0 };  // stands for a number of bits where the numbers are float32 instead of codes

// Numbers of the summed axis that share a word, or that are taken together.
template <int BITS>
constexpr int A_WORD = BITS == EXACT ? 4 : BITS == 3 ? 16 : 32 / (BITS == EXACT ? 8 : BITS);

int64_t a_word(int64_t bits) { return bits == EXACT ? 4 : bits == 3 ? 16 : 32 / bits; }

// Where the loop reads: words, with a plane of high bits behind them at 3 bits, or numbers, `pitch` apart. The next
// block lies `ahead` bytes further: its words are fetched meanwhile, since a processor does not see them coming.
struct Source {
  const void* data;
  const uint32_t* high;
  int64_t pitch, ahead;
};

// Prefetch the cache line of the address `ahead` bytes past p, which may be any address. One vector per line does it.
INLINE void fetch_ahead(const uint32_t* p, int64_t ahead, int64_t lane) {
  if (lane % 16 == 0) __builtin_prefetch((const char*)((uintptr_t)p + (uintptr_t)ahead));
}

// The numbers of a word come in one run, or, of a trellis, in two: those of even and of odd index. `next` takes a row
// of words, rows in order, and gives what `run` takes; `number` takes a run and a place in it.
template <int BITS>
struct Reader {
  enum { RUNS = Stored<BITS>::HAS_TRELLIS ? 2 : 1 };
  using Row = Indices<Words>;
  Levels<BITS> levels;
  INLINE Row next(const Source& s, int64_t row, int64_t lane, Words& before) const {
    const uint32_t* words = (const uint32_t*)s.data + row * s.pitch + lane;
    fetch_ahead(words, s.ahead, lane);
    Words high = {};
    if (BITS == 3) {
      const uint32_t* high_words = s.high + row / 2 * s.pitch + lane;
      if (row % 2 == 0) fetch_ahead(high_words, s.ahead, lane);
      high = load(high_words) >> (unsigned)(row % 2 * 2);
    }
    const Words word = load(words), last = before;
    before = word;
    return indices_of<BITS>(word, last, high);
  }
  INLINE Words run(const Row& row, int odd) const { return odd ? row.odd : row.even; }
  INLINE Floats number(const Source&, int64_t, int64_t, Words run, int i) const { return levels.level(run, i); }
};
template <>
struct Reader<EXACT> {
  enum { RUNS = 1 };
  struct Row {};
  INLINE Row next(const Source&, int64_t, int64_t, Words&) const { return {}; }
  INLINE Words run(const Row&, int) const { return Words{}; }
  INLINE Floats number(const Source& s, int64_t row, int64_t lane, Words, int i) const {
    return load((const float*)s.data + (row * 4 + i) * s.pitch + lane);
  }
};

// sums[r][lane] += sum over i of weights[i][r] number[i][lane], for ROWS rows and VECTORS vectors of lanes;
// `weights` holds [words][ROWS][A_WORD].
template <int BITS, int ROWS, int VECTORS>
INLINE void add_vectors(
    const Reader<BITS>& reader, const Source& source, int64_t words, int64_t lane, const float* weights, float* sums,
    int64_t sums_pitch) {
  Floats acc[VECTORS][ROWS];
  UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) acc[v][r] = load(sums + r * sums_pitch + lane + v * LANES);
  }
  enum { RUNS = Reader<BITS>::RUNS };
  Words before[VECTORS] = {};
  for (int64_t row = 0; row < words; ++row) {
    typename Reader<BITS>::Row row_words[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; ++v) row_words[v] = reader.next(source, row, lane + v * LANES, before[v]);
    UNROLL
    for (int run = 0; run < RUNS; ++run) {
      UNROLL
      for (int i = 0; i < A_WORD<BITS> / RUNS; ++i) {
        Floats number[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; ++v) {
          number[v] = reader.number(source, row, lane + v * LANES, reader.run(row_words[v], run), i);
        }
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
          const Floats weight = all(weights[r * A_WORD<BITS> + i * RUNS + run]);
          UNROLL
          for (int v = 0; v < VECTORS; ++v) acc[v][r] += weight * number[v];
        }
      }
    }
    weights += ROWS * A_WORD<BITS>;
  }
  UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    UNROLL
    for (int r = 0; r < ROWS; ++r) store(sums + r * sums_pitch + lane + v * LANES, acc[v][r]);
  }
}

// The same over `lanes` lanes. Sums have room for whole vectors; the source has not if it holds words.
template <int BITS, int ROWS>
void add(const Source& source, int64_t words, int64_t lanes, const float* weights, float* sums, int64_t sums_pitch) {
  // The sums fill half of the 16 or 32 registers.
  enum { REGISTERS = LANES == 8 ? 8 : 16, MOST = REGISTERS / ROWS };
  enum { VECTORS = MOST >= 4 ? 4 : MOST >= 2 ? 2 : 1 };
  const Reader<BITS> reader;
  int64_t lane = 0;
  for (; lane + VECTORS * LANES <= lanes; lane += VECTORS * LANES) {
    add_vectors<BITS, ROWS, VECTORS>(reader, source, words, lane, weights, sums, sums_pitch);
  }
  for (; lane + LANES <= lanes; lane += LANES) {
    add_vectors<BITS, ROWS, 1>(reader, source, words, lane, weights, sums, sums_pitch);
  }
  if (lane < lanes) {
    // Less than a vector is left: copied where there is room behind it. At most 16 rows of words, and 2 of high bits.
    uint32_t copy[(16 + 2) * LANES] = {};
    float* exact = (float*)copy;
    Source rest = {copy, copy + 16 * LANES, LANES, 0};
    if (BITS == EXACT) {
      rest = source;  // tiles have room
      exact = (float*)source.data + lane;
      rest.data = exact;
    } else {
      const int64_t bytes = sizeof(uint32_t) * (lanes - lane);
      for (int64_t row = 0; row < words; ++row) {
        __builtin_memcpy(copy + row * LANES, (const uint32_t*)source.data + row * source.pitch + lane, bytes);
      }
      if (BITS == 3) {
        for (int64_t row = 0; row < (words + 1) / 2; ++row) {
          __builtin_memcpy(copy + (16 + row) * LANES, source.high + row * source.pitch + lane, bytes);
        }
      }
    }
    add_vectors<BITS, ROWS, 1>(reader, rest, words, 0, weights, sums + lane, sums_pitch);
  }
}

using Add = void (*)(const Source&, int64_t, int64_t, const float*, float*, int64_t);

template <int BITS, int... ROWS>
const Add* table_of(std::integer_sequence<int, ROWS...>) {
  static constexpr Add table[] = {add<BITS, ROWS + 1>...};
  return table;
}

template <int BITS>
Add add_of_rows(int64_t rows) {
  return table_of<BITS>(std::make_integer_sequence<int, MAX_ROWS>())[rows - 1];
}

Add add_of(int64_t bits, int64_t rows) {
  switch (bits) {
    case 2: return add_of_rows<2>(rows);
    case 3: return add_of_rows<3>(rows);
    case 4: return add_of_rows<4>(rows);
    case 8: return add_of_rows<8>(rows);
    default: return add_of_rows<EXACT>(rows);
  }
}

// ---- tiles of query rows ----------------------------------------------------------------------------

struct Tile {
  int64_t first, rows;
};

int64_t tiles_of(int64_t rows) { return (rows + MAX_ROWS - 1) / MAX_ROWS; }

// Tile i of `rows` rows; the sizes of tiles differ by at most one row.
Tile tile_of(int64_t rows, int64_t i) {
  const int64_t tiles = tiles_of(rows), base = rows / tiles, longer = rows % tiles;
  return {i * base + (i < longer ? i : longer), base + (i < longer)};
}

// Row-major [rows][pitch] as add() reads it, [pitch / step][rows][step].
void interleave(const float* from, int64_t rows, int64_t pitch, int64_t count, int64_t step, float* to) {
  for (int64_t first = 0; first < count; first += step) {
    for (int64_t r = 0; r < rows; ++r, to += step) {
      for (int64_t i = 0; i < step; ++i) to[i] = from[r * pitch + first + i];
    }
  }
}

struct Place {
  int64_t head, batch, kv_head, chunk, first_row;  // first_row: of the KV head
};

Place place_of(const Attend& a, int64_t head, int64_t chunk) {
  return {head, head / a.kv_heads, head % a.kv_heads, chunk, chunk * a.chunk_rows};
}

// The offset in [B, H, L, D] of row `row` of a KV head.
INLINE const char* query_row(const Attend& a, const Tensor& x, const Place& at, int64_t row) {
  return row_of(x, at.batch, at.kv_head * a.repeats + row / a.length, row % a.length);
}

int64_t attend_scratch(const Attend& a) {
  const int64_t pitch = a.key_pitch > a.value_pitch ? a.key_pitch : a.value_pitch;
  // Exact tiles of keys and of values; what prepare() and merge() need is less.
  return 2 * pitch * (BLOCK + LANES) + 4 * MAX_ROWS * BLOCK + pitch * (MAX_ROWS + 2) + 2 * BLOCK;
}

// Scale and rotate the query rows of a chunk.
void prepare(const Attend& a, int64_t head, int64_t chunk, float* scratch) {
  const Place at = place_of(a, head, chunk);
  const int64_t dim = a.keys.head_dim, rows = a.rows_of(chunk), pitch = a.key_pitch;
  const int64_t offset = (head * a.rows + at.first_row) * pitch;
  float *plain = a.plain + offset, *by_word = a.by_word + offset, *by_four = a.by_four + offset;
  float* noise = a.noise + head * a.rows + at.first_row;
  float* x = scratch;                // [dim][LANES]
  float* spare = x + dim * LANES;    // [dim][LANES]
  float* rotated = spare + dim * LANES;  // [MAX_ROWS][pitch]
  __builtin_memset(plain, 0, sizeof(float) * rows * pitch);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = plain + r * pitch;
    read_row(query_row(a, a.queries, at, at.first_row + r), a.queries.type, a.queries.strides[3], dim, row);
    for (int64_t c = 0; c < dim; ++c) row[c] *= a.scale;
  }
  for (int64_t i = 0; i < tiles_of(rows); ++i) {
    const Tile tile = tile_of(rows, i);
    const float* tile_rows = plain + tile.first * pitch;
    interleave(tile_rows, tile.rows, pitch, dim, a_word(EXACT), by_four + tile.first * pitch);
    if (a.packed_parts == 0) continue;
    __builtin_memset(rotated, 0, sizeof(float) * MAX_ROWS * pitch);
    for (int64_t first = 0; first < tile.rows; first += LANES) {
      const int64_t count = tile.rows - first < LANES ? tile.rows - first : (int64_t)LANES;
      for (int64_t c = 0; c < dim; ++c) {
        const float factor = channel_factor(a.keys, at.batch, at.kv_head, c);
        for (int64_t r = 0; r < LANES; ++r) {
          x[c * LANES + r] = r < count ? tile_rows[(first + r) * pitch + c] * factor : 0.0f;
        }
      }
      rotate(*a.keys.rotation, at.kv_head, Direction::query, x, spare, LANES, 1);
      Floats squares = {};
      for (int64_t c = 0; c < dim; ++c) {
        squares += load(x + c * LANES) * load(x + c * LANES);
        for (int64_t r = 0; r < count; ++r) rotated[(first + r) * pitch + c] = x[c * LANES + r];
      }
      for (int64_t r = 0; r < count; ++r) noise[tile.first + first + r] = score_noise(a.keys.bits) * squares[r];
    }
    const int64_t step = a_word(a.keys.bits);
    interleave(rotated, tile.rows, pitch, rounded_up(dim, step), step, by_word + tile.first * pitch);
  }
}

// ---- one block of tokens ----------------------------------------------------------------------------

struct BlockView {
  int64_t first, tokens;  // counted from the first packed, or the first exact, token of the batch row
  Source keys, values;
  int64_t key_words, value_words, key_bits, value_bits;
  const float *key_scales, *value_scales;  // [64], or null for exact tokens
  const float* centre;                     // [key pitch], or null
};

// What a batch row holds, and where a token of it stands.
struct Sequence {
  int64_t packed, tokens, sink;
  bool exact;  // which of the two kinds is being done

  int64_t position(int64_t i) const { return !exact ? sink + i : i < sink ? i : packed + i; }
  // The number of tokens of this kind at positions up to `last`.
  int64_t up_to(int64_t last) const {
    if (!exact) return last - sink + 1;
    if (last < sink) return last + 1;
    const int64_t count = last - packed + 1;
    return count < sink ? sink : count;
  }
};

// The number of tokens of a block that row `row` of the KV head sees; masks that are arrays are not considered.
int64_t seen_by(const Attend& a, const Sequence& sequence, const BlockView& block, int64_t row) {
  if (!a.causal) return block.tokens;
  const int64_t last = sequence.tokens - a.length + row % a.length;
  const int64_t count = sequence.up_to(last) - block.first;
  return count < 0 ? 0 : count < block.tokens ? count : block.tokens;
}

// Scores of one row, s [64], after the mask: hidden ones are -infinity.
void hide(const Attend& a, const Place& at, const Sequence& sequence, const BlockView& block, int64_t row, float* s) {
  const int64_t seen = seen_by(a, sequence, block, row);
  for (int64_t t = seen; t < BLOCK; ++t) s[t] = -__builtin_inff();
  if (!a.mask.data) return;
  const int64_t head = at.kv_head * a.repeats + row / a.length;
  const int64_t stride = a.mask.strides[3];
  const char* mask = row_of(a.mask, at.batch, head, row % a.length);
  for (int64_t t = 0; t < seen; ++t) {
    const int64_t i = sequence.position(block.first + t) * stride;
    if (a.mask.type == Type::boolean) {
      if (!mask[i]) s[t] = -__builtin_inff();
    } else {
      s[t] += read(mask, a.mask.type, i);
    }
  }
}

// Take a block into the softmax of a tile of rows. `q` are its rows as they are, `weights` as add() reads them, `noise`
// theirs; `sums` [rows][value_pitch]. `s` and `p` have room for [MAX_ROWS][64].
void attend_block(
    const Attend& a, const Place& at, const Sequence& sequence, const BlockView& block, Tile tile, const float* q,
    const float* weights, const float* noise, float* tops, float* totals, float* sums, float* s, float* p) {
  int64_t seen = 0;
  for (int64_t r = 0; r < tile.rows; ++r) seen += seen_by(a, sequence, block, at.first_row + tile.first + r);
  if (seen == 0) return;
  const int64_t step = a_word(block.value_bits);
  __builtin_memset(s, 0, sizeof(float) * tile.rows * BLOCK);
  add_of(block.key_bits, tile.rows)(block.keys, block.key_words, rounded_up(block.tokens, LANES), weights, s, BLOCK);
  bool any = false;
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* row = s + r * BLOCK;
    if (block.key_scales) {
      Floats about_centre = {};
      for (int64_t c = 0; c < a.key_pitch; c += LANES) {
        about_centre += load(q + r * a.key_pitch + c) * load(block.centre + c);
      }
      const float offset = sum_of_lanes(about_centre);
      for (int64_t t = 0; t < BLOCK; t += LANES) {
        const Floats scale = load(block.key_scales + t);
        store(row + t, (load(row + t) - noise[r] * scale) * scale + offset);
      }
    }
    hide(a, at, sequence, block, at.first_row + tile.first + r, row);

    Floats top = all(tops[r]);
    for (int64_t t = 0; t < BLOCK; t += LANES) top = larger(load(row + t), top);
    const float new_top = largest_lane(top);
    // A row that has seen no token has no top: subtract 0 from its -infinity.
    const Floats reference = all(new_top == -__builtin_inff() ? 0.0f : new_top);
    Floats total = {};
    for (int64_t t = 0; t < BLOCK; t += LANES) {
      Floats weight = exponential(load(row + t) - reference);
      total += weight;
      // The scale of a hidden token may hold any bits, even a NaN.
      if (block.value_scales) {
        weight = choose(weight == 0.0f, Floats{}, weight * load(block.value_scales + t));
      }
      store(row + t, weight);
    }
    const float shrink = exponential(all(tops[r]) - reference)[0];
    totals[r] = totals[r] * shrink + sum_of_lanes(total);
    if (new_top != tops[r]) {
      for (int64_t c = 0; c < a.value_pitch; c += LANES) {
        store(sums + r * a.value_pitch + c, load(sums + r * a.value_pitch + c) * shrink);
      }
      tops[r] = new_top;
    }
    any |= totals[r] != 0.0f;
    float* to = p + r * step;
    for (int64_t t = 0; t < block.value_words * step; t += step, to += tile.rows * step) {
      for (int64_t i = 0; i < step; i += 4) __builtin_memcpy(to + i, row + t + i, 4 * sizeof(float));
    }
  }
  if (!any) return;
  add_of(block.value_bits, tile.rows)(
      block.values, block.value_words, a.values.head_dim, p, sums, a.value_pitch);
}

Source words_of(const Blocks& blocks, const Place& at, int64_t n) {
  const uint32_t* words = blocks.words.at<uint32_t>(at.batch, at.kv_head, n);
  const int64_t axis = blocks.is_key ? blocks.head_dim : BLOCK, pitch = blocks.is_key ? BLOCK : blocks.head_dim;
  return {words, words + (axis + 15) / 16 * pitch, pitch, blocks.words.strides[2] * (int64_t)sizeof(uint32_t)};
}

void read_scales(const Blocks& blocks, const Place& at, int64_t n, float* scales) {
  const Tensor& x = blocks.scales;
  read_row(row_of(x, at.batch, at.kv_head, n), Type::float16, x.strides[3], BLOCK, scales);
}

// One part of the sequence for one chunk of query rows.
void attend_part(const Attend& a, int64_t head, int64_t chunk, int64_t part, float* scratch) {
  const Place at = place_of(a, head, chunk);
  const int64_t rows = a.rows_of(chunk), task = (head * a.chunks + chunk) * a.parts() + part;
  float* tops = a.tops + task * a.chunk_rows;
  float* totals = a.totals + task * a.chunk_rows;
  float* sums = a.sums + task * a.chunk_rows * a.value_pitch;
  for (int64_t r = 0; r < rows; ++r) tops[r] = -__builtin_inff();
  __builtin_memset(totals, 0, sizeof(float) * rows);
  __builtin_memset(sums, 0, sizeof(float) * rows * a.value_pitch);

  const int64_t packed = a.lengths[2 * at.batch], tokens = a.lengths[2 * at.batch + 1];
  const bool exact = part >= a.packed_parts;
  const Sequence sequence = {packed, tokens, a.sink, exact};
  const int64_t count = exact ? tokens - packed : packed;
  const int64_t blocks = exact ? a.exact_part_blocks : a.packed_part_blocks;
  const int64_t first = (exact ? part - a.packed_parts : part) * blocks * BLOCK;
  const int64_t stop = count < first + blocks * BLOCK ? count : first + blocks * BLOCK;
  const int64_t queries = (head * a.rows + at.first_row) * a.key_pitch;
  const float* weights = (exact ? a.by_four : a.by_word) + queries;
  const float* noise = a.noise + head * a.rows + at.first_row;

  float* key_tile = scratch;                                // exact [key_dim][64]
  float* value_tile = key_tile + a.key_pitch * BLOCK;       // exact [64][value_pitch]
  float* s = value_tile + a.value_pitch * BLOCK;            // [MAX_ROWS][64]
  float* p = s + MAX_ROWS * BLOCK;                          // [MAX_ROWS][64]
  float* key_scales = p + MAX_ROWS * BLOCK;                 // [64]
  float* value_scales = key_scales + BLOCK;                 // [64]
  float* centre = value_scales + BLOCK;                     // [key_pitch]
  float* key_rows = centre + a.key_pitch;                   // exact [LANES][key_pitch]
  for (int64_t start = first; start < stop; start += BLOCK) {
    BlockView block = {};
    block.first = start;
    block.tokens = stop - start < BLOCK ? stop - start : BLOCK;
    if (exact) {
      const Tensor &key = a.key_exact, &value = a.value_exact;
      for (int64_t t = 0; t < block.tokens; ++t) {
        read_row(
            row_of(key, at.batch, at.kv_head, start + t), key.type, key.strides[3], a.keys.head_dim,
            key_rows + t % LANES * a.key_pitch);
        read_row(
            row_of(value, at.batch, at.kv_head, start + t), value.type, value.strides[3], a.values.head_dim,
            value_tile + t * a.value_pitch);
        if (t % LANES == LANES - 1 || t == block.tokens - 1) {
          transpose(key_rows, a.key_pitch, a.keys.head_dim, key_tile + t / LANES * LANES, BLOCK);
        }
      }
      const int64_t read_tokens = rounded_up(block.tokens, a_word(EXACT));
      __builtin_memset(
          value_tile + block.tokens * a.value_pitch, 0,
          sizeof(float) * (read_tokens - block.tokens) * a.value_pitch);
      block.keys = {key_tile, nullptr, BLOCK, 0};
      block.values = {value_tile, nullptr, a.value_pitch, 0};
      block.key_words = a.keys.head_dim / a_word(EXACT);
      block.value_words = read_tokens / a_word(EXACT);
    } else {
      const int64_t n = start / BLOCK;
      block.keys = words_of(a.keys, at, n);
      block.values = words_of(a.values, at, n);
      block.key_bits = a.keys.bits;
      block.value_bits = a.values.bits;
      block.key_words = rounded_up(a.keys.head_dim, a_word(block.key_bits)) / a_word(block.key_bits);
      block.value_words = rounded_up(block.tokens, a_word(block.value_bits)) / a_word(block.value_bits);
      read_scales(a.keys, at, n, key_scales);
      read_scales(a.values, at, n, value_scales);
      for (int64_t c = a.keys.head_dim; c < a.key_pitch; ++c) centre[c] = 0.0f;
      read_row(
          row_of(a.keys.centres, at.batch, at.kv_head, n), Type::float16, a.keys.centres.strides[3],
          a.keys.head_dim, centre);
      block.key_scales = key_scales;
      block.value_scales = value_scales;
      block.centre = centre;
    }
    for (int64_t i = 0; i < tiles_of(rows); ++i) {
      const Tile tile = tile_of(rows, i);
      const int64_t offset = tile.first * a.key_pitch;
      attend_block(
          a, at, sequence, block, tile, a.plain + queries + offset, weights + offset, noise + tile.first,
          tops + tile.first, totals + tile.first, sums + tile.first * a.value_pitch, s, p);
    }
  }
}

// Merge all parts of the query rows of a chunk into their output.
void merge(const Attend& a, int64_t head, int64_t chunk, float* scratch) {
  const Place at = place_of(a, head, chunk);
  const int64_t rows = a.rows_of(chunk), dim = a.values.head_dim, pitch = a.value_pitch, parts = a.parts();
  const int64_t task = (head * a.chunks + chunk) * parts;
  float* x = scratch;                  // [pitch][LANES]
  float* spare = x + pitch * LANES;    // [pitch][LANES]
  float* packed = spare + pitch * LANES;  // [pitch]
  for (int64_t first = 0; first < rows; first += LANES) {
    const int64_t count = rows - first < LANES ? rows - first : (int64_t)LANES;
    // A row that has seen no token has no top; with 0 in its place the share is exp(-inf).
    const auto weight_of = [](float score, float top) {
      return exponential(all(score - (top == -__builtin_inff() ? 0.0f : top)))[0];
    };
    const auto share = [&](int64_t part, int64_t row, float top) {
      return weight_of(a.tops[(task + part) * a.chunk_rows + row], top);
    };
    float top[LANES], total[LANES];
    __builtin_memset(x, 0, sizeof(float) * pitch * LANES);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r, query_head = at.kv_head * a.repeats + (at.first_row + row) / a.length;
      const Tensor& logits = a.sink_logits;
      const float logit = logits.data ? read(logits.data, logits.type, query_head * logits.strides[0]) : 0.0f;
      top[r] = logits.data ? logit : -__builtin_inff();
      for (int64_t part = 0; part < parts; ++part) {
        const float of_part = a.tops[(task + part) * a.chunk_rows + row];
        top[r] = of_part > top[r] ? of_part : top[r];
      }
      total[r] = logits.data ? weight_of(logit, top[r]) : 0.0f;
      __builtin_memset(packed, 0, sizeof(float) * pitch);
      for (int64_t part = 0; part < parts; ++part) {
        const float weight = share(part, row, top[r]);
        total[r] += weight * a.totals[(task + part) * a.chunk_rows + row];
        if (part >= a.packed_parts) continue;
        const float* sums = a.sums + ((task + part) * a.chunk_rows + row) * pitch;
        for (int64_t c = 0; c < pitch; c += LANES) store(packed + c, load(packed + c) + weight * load(sums + c));
      }
      for (int64_t c = 0; c < dim; ++c) x[c * LANES + r] = packed[c];
    }
    if (a.packed_parts) rotate(*a.values.rotation, at.kv_head, Direction::back, x, spare, LANES, 1);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r;
      float* out = packed;
      for (int64_t c = 0; c < dim; ++c) {
        out[c] = x[c * LANES + r] * channel_factor(a.values, at.batch, at.kv_head, c);
      }
      for (int64_t part = a.packed_parts; part < parts; ++part) {
        const float weight = share(part, row, top[r]);
        const float* sums = a.sums + ((task + part) * a.chunk_rows + row) * pitch;
        for (int64_t c = 0; c < pitch; c += LANES) store(out + c, load(out + c) + weight * load(sums + c));
      }
      char* to = (char*)query_row(a, a.output, at, at.first_row + row);
      for (int64_t c = 0; c < dim; ++c) {
        write(to, a.output.type, c * a.output.strides[3], total[r] == 0.0f ? 0.0f : out[c] / total[r]);
      }
    }
  }
}

}  // namespace

namespace rotormlx {

extern const AttendKernels VARIANT_NAME(attend);
const AttendKernels VARIANT_NAME(attend) = {attend_scratch, prepare, attend_part, merge};

}  // namespace rotormlx
