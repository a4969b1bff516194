// Compiled once for each instruction set, with VLM_ISA naming it; dispatch.cpp picks one at run time.
#include <new>

#include "conv.h"
#include "scan.h"

namespace VLM_ISA {

void run_scan(const VlmScan &p, bool backward, bool fp64) {
  if (fp64) backward ? scan_backward<double>(p) : scan_forward<double>(p);
  else backward ? scan_backward<float>(p) : scan_forward<float>(p);
}

void run_conv(const VlmConv &p, bool backward, bool fp64) {
  if (fp64) conv<double>(p, backward);
  else conv<float>(p, backward);
}

}  // namespace VLM_ISA
