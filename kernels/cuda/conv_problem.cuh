// What the host hands to the convolutions: raw pointers, sizes and strides in elements. Plain structs, by value.
// Letters: b batch, l length, e channels, w taps, s stretches, d directions. Channels are contiguous. The sequences x,
// out, du and dx are of the stored type, the rest is fp32. The first direction is causal, the second its mirror image:
//   u_f[t] = silu(bias + sum_k weight[:, k] x[t - (w-1-k)])     u_b[t] = silu(bias + sum_k weight[:, k] x[t + (w-1-k)])
//
// One compilation serves one kind of problem, chosen by macros:
//   VLM_IO          fp32, bf16, fp16: the stored type
//   VLM_TAPS        2, 3, 4
//   VLM_DIRECTIONS  1: only the causal one. 2
//   VLM_ALIGNED     1: all pointers are multiples of 16 bytes, and so are the strides and the size of `channels`
//                   elements. 0: nothing is asked of them
//   VLM_SEGMENTS    1: `segments` is given. 0: it is null
//
// Lanes in groups ("walkers") walk along time, each over `stretch` steps of kTileChannels channels. The host chooses
// the stretch so that the walkers fill the GPU; each walks 2 (w-1) steps more than it answers for, and it walks whole
// tiles of kRows, so 8 n - 2 (w-1) wastes nothing.
// Launch: grid = ceil(batch * ceil(l / stretch) * ceil(e / kTileChannels) / kSlots), block = kThreads, dynamic shared
// memory = kSharedBytes. These stand in `vlm_conv_forward_geometry` and `vlm_conv_backward_geometry` of the compiled
// modules as (kThreads, kSharedBytes, kTileChannels, kSlots).
#pragma once

namespace vlm {

struct ConvSequence {
  const void *x;                          // (b, l, e), strided rows; the stride of a row is below 2^31
  const int *segments;                    // (b, l) or null; taps in a segment of another number count as zero
  long long batch, length, channels, stretch;
  long long x_batch, x_row;
};

struct ConvFilter {
  const float *weight;                    // (e, w) contiguous
  const float *bias;                      // (e) or null
};

struct ConvForward {
  ConvSequence sequence;
  ConvFilter filter[2];
  void *out[2];                           // (b, l, e) contiguous
};

struct ConvBackward {
  ConvSequence sequence;
  ConvFilter filter[2];
  const void *du[2];                      // (b, l, e), strided rows as x
  long long du_batch[2], du_row[2];
  void *dx;                               // (b, l, e) contiguous: the sum over the directions
  float *sums;                            // (b, s, d, w + 1, e): of each walker, what it adds to the gradients of the
                                          // taps and, last, of the bias; the host sums over b and s
};

}  // namespace vlm
