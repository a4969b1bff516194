// The few functions that the recurrence is made of, in fp32.
#pragma once
#include "ptx.cuh"

namespace vlm {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 2^x for x <= 0 without the unit for exponentials, which is what bounds a scan. Relative error 2e-7; what is below
// 2^-126 becomes that. Added to the constant, x leaves its nearest integer, biased, in the low bits of the sum.
__device__ __forceinline__ float exp2_polynomial(float x) {
  x = max_or_nan(x, -126.0f);
  constexpr float kRounder = 12582912.0f + 127.0f;
  const float sum = x + kRounder, f = x - (sum - kRounder);
  float p = fmaf(0.001326472731307149f, f, 0.009671512991189957f);
  p = fmaf(p, f, 0.05550733581185341f);
  p = fmaf(p, f, 0.24022242426872253f);
  p = fmaf(p, f, 0.6931470036506653f);
  p = fmaf(p, f, 1.0f);
  return p * __uint_as_float(__float_as_uint(sum) << 23);
}

// max(x, 0) + log(1 + t) with t = exp(-|x|): one exponential, and small results keep their relative accuracy, which
// a logarithm of 1 + t would lose. NaN passes through t.
__device__ __forceinline__ float softplus(float x) {
  const float t = exp2_approx(-kLog2E * fabsf(x));
  float p = fmaf(0.005232691457328379f, t, -0.029505227528950972f);
  p = fmaf(p, t, 0.07822593355937403f);
  p = fmaf(p, t, -0.13663244240588432f);
  p = fmaf(p, t, 0.19106006029715017f);
  p = fmaf(p, t, -0.24842982026756527f);
  p = fmaf(p, t, 0.33319096784032265f);
  p = fmaf(p, t, -0.49999493139348705f);
  p = fmaf(p, t, 0.9999999698794717f);
  return fmaf(p, t, fmaxf(x, 0.0f));
}

// The derivative of softplus where its value is y: 1 - exp(-y). Below 1/4 that difference cancels, and its series takes
// over.
__device__ __forceinline__ float softplus_slope(float y) {
  float p = fmaf(-1.0f / 720.0f, y, 1.0f / 120.0f);
  p = fmaf(p, y, -1.0f / 24.0f);
  p = fmaf(p, y, 1.0f / 6.0f);
  p = fmaf(p, y, -0.5f);
  p = fmaf(p, y, 1.0f);
  return y < 0.25f ? p * y : 1.0f - exp2_approx(-kLog2E * y);
}

// a tanh would cost one instruction less, but its error is absolute, and large against the gate where that is small
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-kLog2E * x)); }

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

}  // namespace vlm
