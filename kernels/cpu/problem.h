// What the caller hands over: raw pointers, sizes and strides, in elements. Mirrored by vlm/ops/cpu_library.py.
// Letters: b batch, l length, e channels, g groups, n states. Channels are contiguous, or, if `turned`, steps.
// Sequences (u, delta, B, C, z, x, their outputs and gradients) are of the stored type; parameters, states and sums
// of gradients of the computing type, which is fp32 for stored bf16.
#pragma once
#include <cstdint>

constexpr int kFp32 = 0, kFp64 = 1, kBf16 = 2;   // stored types
// steps between kept states; the backward pass works through one such chunk at a time
constexpr int64_t kChunk = 32;
constexpr int64_t kTaps = 4;
constexpr int64_t kConvRows = 2 * (kTaps + 1);
// steps of one convolution task
constexpr int64_t kConvTile = 64;

extern "C" {

struct VlmDirection {
  const void *u, *delta;            // (b, l, e), strided rows
  const void *A;                    // (e, n)
  const void *B, *C;                // (b, l, g, n), strided rows and groups
  const void *D, *bias;             // (e) or null
  const void *initial;              // (b, n, e) or null
  void *last;                       // (b, n, e) or null
  void *kept;                       // (b, ceil(l / kChunk), n, e) states at chunk starts, or null
  void *du, *ddelta;                // (b, l, e) contiguous
  void *dBC;                        // (parts, b, l, g, 2n) of the computing type: dB then dC
  void *dA;                         // (b, n, e), to be summed over b
  void *dD, *dbias;                 // (b, e), to be summed over b
  void *dinitial;                   // (b, n, e) or null
  int64_t u_batch, u_row, delta_batch, delta_row, bc_batch, bc_row, bc_group;
  int64_t reverse;
};

struct VlmScan {
  int64_t batch, length, channels, states, groups, directions, softplus, threads, parts;
  const int32_t *segments;          // (b, l) or null; the state is dropped where the number changes
  const void *z;                    // (b, l, e) gate or null
  int64_t z_batch, z_row;
  const void *dout;                 // (b, l, e) contiguous
  void *out;                        // (b, l, e) contiguous
  void *total;                      // (b, l, e) contiguous: the sum before the gate, or null
  void *dz;                         // (b, l, e) contiguous or null
  VlmDirection direction[2];
  // 0: the sequences above have channels last. 1: (b, e, l), B and C (b, g, n, l), their outputs and gradients too;
  // a row is then a channel or a state
  int64_t turned;
};

struct VlmConv {
  int64_t batch, length, channels, taps, threads;
  const int32_t *segments;
  const void *x;                    // (b, l, e), strided rows
  int64_t x_batch, x_row;
  const void *weight_f, *bias_f, *weight_b, *bias_b;   // (e, taps), (e); weight_b null = one direction
  void *u_f, *u_b;                  // (b, l, e) contiguous
  const void *du_f, *du_b;          // (b, l, e) contiguous
  void *dx;                         // (b, l, e) contiguous
  void *dparameters;                // (b, tiles, kConvRows, e): taps then bias, forward then backward
};
}
