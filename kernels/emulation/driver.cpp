// One kernel as a library of plain C. The compiler is told which: VLM_SOURCE the file, VLM_ENTRY the kernel's name,
// VLM_PROBLEM the type of its only argument.
#define VLM_EMULATION
#include "device.h"

#include VLM_SOURCE

extern "C" {

int64_t vlm_problem_bytes() { return sizeof(VLM_PROBLEM); }

// null, or what went wrong; the text lives until the next call
const char *vlm_emulate(const VLM_PROBLEM *problem, int64_t grid, int64_t threads, int64_t shared_bytes, int64_t seed) {
  static std::string message;
  try {
    emulation::launch([problem] { VLM_ENTRY(*problem); }, static_cast<unsigned>(grid), static_cast<unsigned>(threads),
                      static_cast<size_t>(shared_bytes), static_cast<uint64_t>(seed));
  } catch (const std::exception &error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
}
