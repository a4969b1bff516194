// Plays the driver library: keeps books instead of driving a GPU, and refuses what the real one refuses. Two devices.
#include <cstdint>
#include <cstring>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr int kInvalidValue = 1, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500;
constexpr int kCaptureUnsupported = 900, kContextBase = 0xC000, kMost = 227 * 1024;

struct Function {
  int device;
  std::string entry;
  int allowed = 48 * 1024;
};

std::mutex mutex;
std::string log_text, failing_name, images;
int failing_code = 0, capturing = 0;
size_t argument_bytes = 0;
std::vector<int> module_device;
std::vector<Function> functions;
thread_local std::vector<int> contexts;
thread_local int capture_mode = 0;

// notes the call; the code that a test asked this call to fail with, or 0
int note(const std::string &name, const std::string &text = "") {
  std::lock_guard<std::mutex> guard(mutex);
  log_text += name + (text.empty() ? "" : " ") + text + "\n";
  return name == failing_name ? failing_code : 0;
}

int current() { return contexts.empty() ? -1 : contexts.back(); }

}  // namespace

#define BEGIN(name, text)                       \
  if (int code = note(name, text)) return code;

extern "C" {

// what tests say to the fake
void fake_reset(uint64_t bytes) {
  std::lock_guard<std::mutex> guard(mutex);
  log_text.clear();
  failing_name.clear();
  argument_bytes = bytes;
  capturing = 0;
}
void fake_fail(const char *name, int code) {
  failing_name = name;
  failing_code = code;
}
void fake_capture(int on) { capturing = on; }
void fake_enter(int device) { contexts.push_back(device); }
void fake_leave() { contexts.pop_back(); }
int fake_depth() { return static_cast<int>(contexts.size()); }
const char *fake_log() { return log_text.c_str(); }

int cuInit(unsigned) {
  BEGIN("cuInit", "");
  return 0;
}
int cuDriverGetVersion(int *version) {
  *version = 12080;
  return 0;
}
int cuDeviceGet(int *device, int index) {
  if (index < 0 || index > 1) return 101;
  *device = index;
  return 0;
}
int cuDeviceGetAttribute(int *value, int number, int device) {
  const int capability = device == 0 ? 90 : 75;
  *value = number == 75 ? capability / 10 : number == 76 ? capability % 10 : number == 97 ? kMost : -1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  BEGIN("cuDevicePrimaryCtxRetain", std::to_string(device));
  *context = reinterpret_cast<void *>(static_cast<uintptr_t>(kContextBase + device));
  return 0;
}
int cuCtxGetCurrent(void **context) {
  BEGIN("cuCtxGetCurrent", "");
  *context = current() < 0 ? nullptr : reinterpret_cast<void *>(static_cast<uintptr_t>(kContextBase + current()));
  return 0;
}
int cuCtxPushCurrent_v2(void *context) {
  const int device = static_cast<int>(reinterpret_cast<uintptr_t>(context)) - kContextBase;
  BEGIN("cuCtxPushCurrent", std::to_string(device));
  if (device < 0 || device > 1) return kInvalidContext;
  contexts.push_back(device);
  return 0;
}
int cuCtxPopCurrent_v2(void **) {
  note("cuCtxPopCurrent");
  if (contexts.empty()) return kInvalidContext;
  contexts.pop_back();
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
  note("cuThreadExchangeStreamCaptureMode", std::to_string(*mode));
  std::swap(*mode, capture_mode);
  return 0;
}
int cuModuleLoadData(void **module, const void *image) {
  BEGIN("cuModuleLoadData", "");
  if (current() < 0) return kInvalidContext;
  if (capturing && capture_mode != 2) return kCaptureUnsupported;
  if (std::memcmp(image, "\x7f""ELF", 4) != 0) return 200;
  std::lock_guard<std::mutex> guard(mutex);
  module_device.push_back(current());
  *module = reinterpret_cast<void *>(module_device.size());
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *entry) {
  BEGIN("cuModuleGetFunction", entry);
  if (std::strncmp(entry, "vlm_", 4) != 0) return kNotFound;
  std::lock_guard<std::mutex> guard(mutex);
  functions.push_back({module_device.at(reinterpret_cast<uintptr_t>(module) - 1), entry});
  *function = reinterpret_cast<void *>(functions.size());
  return 0;
}
int cuFuncLoad(void *) {
  BEGIN("cuFuncLoad", "");
  return capturing && capture_mode != 2 ? kCaptureUnsupported : 0;
}
int cuFuncSetAttribute(void *handle, int attribute, int value) {
  BEGIN("cuFuncSetAttribute", std::to_string(attribute) + " " + std::to_string(value));
  Function &function = functions.at(reinterpret_cast<uintptr_t>(handle) - 1);
  if (function.device != current()) return kInvalidHandle;
  if (attribute != 8 || value > kMost) return kInvalidValue;
  function.allowed = value;
  return 0;
}
int cuLaunchKernel(void *handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared_bytes, void *stream, void **parameters, void **extra) {
  std::ostringstream text;
  const Function &function = functions.at(reinterpret_cast<uintptr_t>(handle) - 1);
  text << function.entry << " device " << function.device << " grid " << gx << " " << gy << " " << gz << " block "
       << bx << " " << by << " " << bz << " shared " << shared_bytes << " stream "
       << reinterpret_cast<uintptr_t>(stream) << " argument ";
  const unsigned char *bytes = static_cast<const unsigned char *>(parameters[0]);
  for (size_t i = 0; i < argument_bytes; ++i)
    text << "0123456789abcdef"[bytes[i] >> 4] << "0123456789abcdef"[bytes[i] & 15];
  BEGIN("cuLaunchKernel", text.str());
  if (current() < 0) return kInvalidContext;
  if (function.device != current()) return kInvalidHandle;
  if (static_cast<int>(shared_bytes) > function.allowed || extra) return kInvalidValue;
  return 0;
}
int cuGetErrorName(int code, const char **name) {
  *name = code == 1     ? "CUDA_ERROR_INVALID_VALUE"
          : code == 200 ? "CUDA_ERROR_INVALID_IMAGE"
          : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                        : nullptr;
  return *name ? 0 : kInvalidValue;
}
int cuGetErrorString(int code, const char **text) {
  *text = code == 700 ? "an illegal memory access was encountered" : nullptr;
  return *text ? 0 : kInvalidValue;
}

// nothing on the way to a launch may wait: these are here so that it would be seen
int cuCtxSynchronize() { return note("cuCtxSynchronize"); }
int cuStreamSynchronize(void *) { return note("cuStreamSynchronize"); }
int cuEventSynchronize(void *) { return note("cuEventSynchronize"); }
}
