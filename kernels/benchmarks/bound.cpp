// The fastest that this processor can do the multiply unit's work of a scan: the arithmetic of kernels/cpu for
// each state update, on registers alone, enough chains side by side to hide every latency. Compiled with VLM_ISA
// and the flags of one instruction set. Time only: the numbers mean nothing.
#include "vector.h"

extern "C" float updates(int64_t vectors) {
  using namespace VLM_ISA;
  using V = Lanes<float>::Vector;
  constexpr int kChains = 8;
  V h[kChains], y[2] = {}, A = Lanes<float>::broadcast(-1.0f), driven = Lanes<float>::broadcast(0.5f);
  for (V &x : h) x = driven;
  V dt = Lanes<float>::broadcast(0.25f);
  for (int64_t i = 0; i < vectors; i += kChains) {
#pragma GCC unroll 8
    for (int k = 0; k < kChains; ++k) {
      // the compiler may not see that these stay the same
      asm volatile("" : "+v"(A), "+v"(dt));
      h[k] = Lanes<float>::decay(dt, A) * h[k] + driven * A;
      y[k % 2] += h[k] * dt;
    }
  }
  y[0] += y[1];
  float total = 0;
  for (int i = 0; i < Lanes<float>::width; ++i) total += y[0][i];
  return total;
}

extern "C" int64_t width() { return VLM_ISA::Lanes<float>::width; }
