// What the host hands to the norm: raw pointers, sizes and strides in elements. Plain structs, by value.
// A row is what is normalised, `width` elements that lie side by side. `x`, `out`, `dout` and `dx` are of the stored
// type, the rest is fp32.
//   stream = x + residual     out = stream * rms * weight     rms = (mean(stream^2) + eps)^(-1/2)
//
// One compilation serves one kind of problem, chosen by macros:
//   VLM_IO       fp32, bf16, fp16: the stored type
//   VLM_PIECES   1 to 8: the width is at most so many pieces of kPiece elements, and a row stays in registers between
//                its two uses. 0: any width, rows are read twice
//   VLM_ALIGNED  1: all pointers are multiples of 16 bytes, and so are the strides and the size of `width` elements of
//                the stored type. 0: nothing is asked of them
//
// Launch, of both: block = kThreads, dynamic shared memory as below.
//   forward   grid = ceil(rows / kWarps), no shared memory
//   backward  grid = ceil(rows / block_rows), kSharedBytes; block_rows is the host's choice up to kMostRows. The rms is
//             computed again: the rows that it is made of are needed anyway
// `vlm_norm_geometry` of the compiled module is (kThreads, kSharedBytes, kWarps, kPiece, kMostRows).
#pragma once

namespace vlm {

struct NormForward {
  const void *x;          // (rows, width), strided rows
  const float *residual;  // (rows, width) contiguous, or null
  const float *weight;    // (width)
  void *out;              // (rows, width) contiguous
  float *stream;          // (rows, width) contiguous, or null; may be `residual`
  long long rows, width, x_row;
  float eps;
};

struct NormBackward {
  const float *stream;    // (rows, width) contiguous
  const void *dout;       // (rows, width), strided rows
  const float *dstream;   // (rows, width) contiguous: the gradient that reaches the stream elsewhere, or null
  const float *weight;    // (width)
  void *dx;               // (rows, width) contiguous, or null
  float *dresidual;       // (rows, width) contiguous, or null: the same gradient as dx
  float *sums;            // (ceil(rows / block_rows), width): what each block adds to the gradient of the weight; the
                          // host sums them
  long long rows, width, dout_row, block_rows;
  float eps;
};

}  // namespace vlm
