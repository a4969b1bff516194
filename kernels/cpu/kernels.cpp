// Compiled once for each instruction set, with VLM_ISA naming it; dispatch.cpp picks one at run time.
#include <new>

#include "conv.h"
#include "scan.h"

namespace VLM_ISA {

void run_scan(const VlmScan &p, bool backward, int stored) {
  if (stored == kFp64) backward ? scan_backward<double, double>(p) : scan_forward<double, double>(p);
  else if (stored == kBf16) backward ? scan_backward<float, BFloat16>(p) : scan_forward<float, BFloat16>(p);
  else backward ? scan_backward<float, float>(p) : scan_forward<float, float>(p);
}

void run_conv(const VlmConv &p, bool backward, int stored) {
  if (stored == kFp64) conv<double, double>(p, backward);
  else if (stored == kBf16) conv<float, BFloat16>(p, backward);
  else conv<float, float>(p, backward);
}

}  // namespace VLM_ISA
