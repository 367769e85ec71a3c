#include "report.h"

#include <cstdarg>
#include <cstdio>

#include "memory.h"
#include "scheduler.h"

namespace emulator {

namespace {

Violation* violation;

void record(const char* kind, const std::string& buffer, const char* format, va_list arguments) {
  if (violated()) return;
  std::snprintf(violation->kind, sizeof violation->kind, "%s", kind);
  std::snprintf(violation->buffer, sizeof violation->buffer, "%s", buffer.c_str());
  std::vsnprintf(violation->message, sizeof violation->message, format, arguments);
}

void copy_index(uint32_t (&to)[3], const Index3& from) {
  to[0] = from.x;
  to[1] = from.y;
  to[2] = from.z;
}

void record_place(const ThreadContext& thread, int line, const void* caller) {
  copy_index(violation->threadgroup, thread.threadgroup_position);
  copy_index(violation->thread, thread.position_in_grid);
  violation->line = line;
  violation->module_offset = caller ? offset_in_kernel_module(caller) : 0;
}

}  // namespace

void start_reporting(Violation* destination) {
  violation = destination;
  *violation = Violation{};
}

bool violated() { return violation->kind[0] != '\0'; }

void fail(const char* kind, const std::string& buffer, int line, const void* caller,
          const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(kind, buffer, format, arguments);
  va_end(arguments);
  record_place(scheduler.context(), line, caller);
  scheduler.abandon_launch();
}

void report_for_thread(const char* kind, const ThreadContext& thread, int line, const char* format,
                       ...) {
  va_list arguments;
  va_start(arguments, format);
  record(kind, "", format, arguments);
  va_end(arguments);
  record_place(thread, line, nullptr);
}

void report_for_launch(const char* kind, const std::string& buffer, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(kind, buffer, format, arguments);
  va_end(arguments);
}

}  // namespace emulator
