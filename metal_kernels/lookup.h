// Ways to find the level of a code, for the kernel of few queries. All give the same numbers.

enum { FROM_TABLE = 0 };

// `at` gives the level of a field of a word. FLOATS are the threadgroup memory it needs, which the threads fill
// together; a barrier must follow.
template <int BITS, int KIND>
struct Lookup;

// A table in threadgroup memory.
template <int BITS>
struct Lookup<BITS, FROM_TABLE> {
  enum { FLOATS = Stored<BITS>::LEVELS };
  threadgroup const float* table;

  static METAL_FUNC Lookup make(threadgroup float* memory, uint thread_index, uint threads) {
    fill_levels<BITS>(memory, thread_index, threads);
    return {memory};
  }
  METAL_FUNC float at(Indices<uint> word, uint field) const { return table[index_of_field<BITS>(word, field)]; }
};
