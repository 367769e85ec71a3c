// How a broken rule is reported. The first one ends the launch; later ones are not looked for.
#pragma once

#include <string>

#include "launch.h"

namespace emulator {

// Reports on behalf of the running thread and leaves it for good. Give either the source line or
// the return address into the kernel's code.
[[noreturn, gnu::format(printf, 5, 6)]] void fail(const char* kind, const std::string& buffer,
                                                  int line, const void* caller,
                                                  const char* format, ...);

// Reports a violation found by the scheduler, with a thread that is concerned.
[[gnu::format(printf, 4, 5)]] void report_for_thread(const char* kind, const ThreadContext& thread,
                                                     int line, const char* format, ...);

// Reports a violation of the launch as a whole.
[[gnu::format(printf, 3, 4)]] void report_for_launch(const char* kind, const std::string& buffer,
                                                     const char* format, ...);

bool violated();
void start_reporting(Violation* destination);

}  // namespace emulator
