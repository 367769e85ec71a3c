// Runs the CPU library without Python: under a sanitizer, or for another processor. Usage: driver problem result
//
// `problem` is a sequence of numbers (int64): arrays, rotations and calls, as tests/cpu/test_library.py writes them;
// `result` gets the bytes of all arrays after the calls, in order.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <vector>

#include "../../cpu_kernels/problem.h"

extern "C" {
const char* rotormlx_encode(const rotormlx::CodecCall*);
const char* rotormlx_decode(const rotormlx::CodecCall*);
const char* rotormlx_attend(const rotormlx::AttendCall*);
const char* rotormlx_announce(int64_t);
}

namespace {

using namespace rotormlx;

std::ifstream problem;

int64_t number() {
  int64_t n = 0;
  problem.read((char*)&n, sizeof n);
  return n;
}

void read_into(void* to, size_t bytes) { problem.read((char*)to, bytes); }

// An allocation of the exact size, so that a sanitizer sees what lies behind it.
struct Stored {
  Array array = {};
  int64_t shape[5] = {};
  size_t bytes = 0;
};

struct Rotations {
  Rotation rotation = {};
  std::vector<Stage> stages;
  std::deque<std::vector<float>> numbers;

  const float* floats(int64_t count) {
    numbers.emplace_back(count);
    read_into(numbers.back().data(), sizeof(float) * count);
    return numbers.back().data();
  }
};

std::deque<Stored> arrays;
std::deque<Rotations> rotations;

void read_array() {
  Stored& stored = arrays.emplace_back();
  Array& a = stored.array;
  a.device_type = 1;
  a.kind = (uint8_t)number();
  a.bits = (uint8_t)number();
  a.ndim = (int32_t)number();
  stored.bytes = a.bits / 8;
  for (int i = 0; i < a.ndim; ++i) stored.bytes *= stored.shape[i] = number();
  a.shape = stored.shape;
  a.data = std::malloc(stored.bytes);
  read_into(a.data, stored.bytes);
}

void read_rotation() {
  Rotations& r = rotations.emplace_back();
  r.rotation.head_dim = number();
  r.rotation.stage_count = number();
  for (int64_t i = 0; i < r.rotation.stage_count; ++i) {
    Stage s = {};
    s.start = number();
    s.radix = number();
    s.stride = number();
    s.outer = number();
    s.blocks = r.floats(s.outer * s.stride * s.radix * s.radix);
    r.stages.push_back(s);
  }
  r.rotation.stages = r.stages.data();
  const int64_t size = r.rotation.head_dim * r.rotation.head_dim;
  if (const int64_t matrices = number()) {
    r.rotation.matrix = r.floats(matrices * size);
    r.rotation.inverse_transpose = r.floats(matrices * size);
    r.rotation.matrix_stride = matrices > 1 ? size : 0;
  }
}

Array* array_of(int64_t index) { return index < 0 ? nullptr : &arrays[index].array; }

Packed packed() {
  Packed p = {};
  for (Array** a : {&p.words, &p.scales, &p.centres, &p.channel_scale}) *a = array_of(number());
  return p;
}

Coding coding() {
  Coding c = {};
  c.rotation = &rotations[number()].rotation;
  c.bits = number();
  c.is_key = number();
  return c;
}

void check(const char* message) {
  if (!message) return;
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

void codec_call(const char* (*function)(const CodecCall*)) {
  CodecCall call = {};
  call.rows = array_of(number());
  call.packed = packed();
  call.coding = coding();
  call.state = array_of(number());
  call.start = number();
  call.given_centres = number();
  call.threads = number();
  check(function(&call));
}

void attend() {
  AttendCall call = {};
  for (Array** a : {&call.queries, &call.output, &call.mask, &call.sink_logits}) *a = array_of(number());
  for (Source* source : {&call.keys, &call.values}) {
    source->exact = array_of(number());
    source->packed = packed();
    source->coding = coding();
  }
  call.sink = number();
  call.causal = number();
  const int64_t scale = number();
  std::memcpy(&call.scale, &scale, sizeof scale);
  call.threads = number();
  // The lengths stand behind the call, in memory of the exact size.
  const int64_t count = number();
  char* memory = (char*)std::malloc(sizeof call + sizeof(int64_t) * count);
  std::memcpy(memory, &call, sizeof call);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = number();
    std::memcpy(memory + sizeof call + sizeof n * i, &n, sizeof n);
  }
  check(rotormlx_announce(call.threads));
  check(rotormlx_attend((const AttendCall*)memory));
  std::free(memory);
}

}  // namespace

int main(int, char** arguments) {
  problem.open(arguments[1], std::ios::binary);
  while (problem.peek() != EOF) {
    switch (number()) {
      case 'A': read_array(); break;
      case 'R': read_rotation(); break;
      case 'E': codec_call(rotormlx_encode); break;
      case 'D': codec_call(rotormlx_decode); break;
      case 'T': attend(); break;
      default: check("damaged problem");
    }
  }
  std::ofstream result(arguments[2], std::ios::binary);
  for (Stored& stored : arrays) {
    result.write((const char*)stored.array.data, stored.bytes);
    std::free(stored.array.data);
  }
}
