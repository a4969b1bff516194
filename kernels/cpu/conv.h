// Both directions' depthwise convolution with bias and SiLU: the input is read once, a window of seven rows slides
// along. The backward pass recomputes the convolution, so nothing is kept between the two.
#pragma once
#include "problem.h"
#include "vector.h"

namespace VLM_ISA {

// taps and bias of both directions as (kConvRows, e), taps padded on the far side
template <class T> void arrange_taps(const VlmConv &p, T *to) {
  const T *weights[2] = {static_cast<const T *>(p.weight_f), static_cast<const T *>(p.weight_b)};
  const T *biases[2] = {static_cast<const T *>(p.bias_f), static_cast<const T *>(p.bias_b)};
  for (int d = 0; d < 2; ++d) {
    for (int64_t k = 0; k < kTaps; ++k, to += p.channels)
      for (int64_t e = 0; e < p.channels; ++e) {
        const int64_t tap = k - (kTaps - p.taps);
        to[e] = weights[d] && tap >= 0 ? weights[d][e * p.taps + tap] : T(0);
      }
    for (int64_t e = 0; e < p.channels; ++e) to[e] = biases[d] ? biases[d][e] : T(0);
    to += p.channels;
  }
}

template <class T, class S> struct ConvTask {
  using Vector = typename Lanes<T>::Vector;
  const VlmConv &p;
  int64_t b, e, lanes;
  const int32_t *segments;
  Vector taps[kConvRows];

  ConvTask(const VlmConv &p, const T *rows, int64_t b, int64_t e) : p(p), b(b), e(e) {
    const int64_t left = p.channels - e;
    lanes = left < Lanes<T>::width ? left : Lanes<T>::width;
    segments = p.segments ? p.segments + b * p.length : nullptr;
    for (int64_t k = 0; k < kConvRows; ++k) taps[k] = load(rows + k * p.channels + e, lanes);
  }
  VLM_INLINE Vector x(int64_t t) const {
    if (t < 0 || t >= p.length) return Vector{};
    return load(static_cast<const S *>(p.x) + b * p.x_batch + t * p.x_row + e, lanes);
  }
  VLM_INLINE bool apart(int64_t s, int64_t t) const {
    return segments && s >= 0 && s < p.length && segments[s] != segments[t];
  }
  // rows t-3 .. t+3 without what belongs to other segments
  VLM_INLINE void window(const Vector *rows, int64_t t, Vector *mine) const {
    for (int i = 0; i < 7; ++i) mine[i] = apart(t - 3 + i, t) ? Vector{} : rows[i];
  }
  VLM_INLINE Vector causal(const Vector *w) const {
    return taps[4] + taps[0] * w[0] + taps[1] * w[1] + taps[2] * w[2] + taps[3] * w[3];
  }
  VLM_INLINE Vector anticausal(const Vector *w) const {
    return taps[9] + taps[5] * w[6] + taps[6] * w[5] + taps[7] * w[4] + taps[8] * w[3];
  }
};

// all channels of a step before the next step, so that memory is read and written in its own order; the seven rows
// that a step sees are in the first cache
template <class T, class S>
void conv_forward_tile(const VlmConv &p, const T *taps, int64_t b, int64_t start, int64_t end) {
  using Vector = typename Lanes<T>::Vector;
  S *u_f = static_cast<S *>(p.u_f), *u_b = static_cast<S *>(p.u_b);
  for (int64_t t = start; t < end; ++t) {
    const bool inside = !p.segments && t >= 3 && t + 3 < p.length;
    for (int64_t e = 0; e < p.channels; e += Lanes<T>::width) {
      const ConvTask<T, S> c(p, taps, b, e);
      Vector rows[7];
      if (__builtin_expect(inside, 1)) {
        const S *x = static_cast<const S *>(p.x) + b * p.x_batch + (t - 3) * p.x_row + e;
#pragma GCC unroll 7
        for (int i = 0; i < 7; ++i) rows[i] = load(x + i * p.x_row, c.lanes);
      } else {
        for (int i = 0; i < 7; ++i) rows[i] = c.apart(t - 3 + i, t) ? Vector{} : c.x(t - 3 + i);
      }
      const int64_t to = (b * p.length + t) * p.channels + e;
      const Vector f = c.causal(rows);
      store(u_f + to, f * sigmoid<T>(f), c.lanes);
      if (!p.weight_b) continue;
      const Vector a = c.anticausal(rows);
      store(u_b + to, a * sigmoid<T>(a), c.lanes);
    }
  }
}

template <class T> VLM_INLINE typename Lanes<T>::Vector silu_slope(typename Lanes<T>::Vector x) {
  const typename Lanes<T>::Vector gate = sigmoid<T>(x);
  return gate * (x * (T(1) - gate) + T(1));
}

template <class T, class S>
void conv_backward_block(const ConvTask<T, S> &c, int64_t start, int64_t end, T *dparameters) {
  using Vector = typename Lanes<T>::Vector;
  const VlmConv &p = c.p;
  const S *du_f = static_cast<const S *>(p.du_f), *du_b = static_cast<const S *>(p.du_b);
  // gradients before SiLU of the tile and three rows on either side
  Vector df[kConvTile + 6], db[kConvTile + 6], sums[kConvRows] = {};
  Vector rows[7], mine[7];
  for (int i = 0; i < 6; ++i) rows[i + 1] = c.x(start - 6 + i);
  for (int64_t t = start - 3; t < end + 3; ++t) {
    for (int i = 0; i < 6; ++i) rows[i] = rows[i + 1];
    rows[6] = c.x(t + 3);
    Vector &f = df[t - start + 3], &a = db[t - start + 3];
    f = a = Vector{};
    if (t < 0 || t >= p.length) continue;
    c.window(rows, t, mine);
    const int64_t from = (c.b * p.length + t) * p.channels + c.e;
    f = load(du_f + from, c.lanes) * silu_slope<T>(c.causal(mine));
    if (p.weight_b) a = load(du_b + from, c.lanes) * silu_slope<T>(c.anticausal(mine));
    if (t < start || t >= end) continue;
    for (int k = 0; k < 4; ++k) {
      sums[k] += f * mine[k];
      sums[5 + k] += a * mine[6 - k];
    }
    sums[4] += f;
    sums[9] += a;
  }
  for (int64_t t = start; t < end; ++t) {
    Vector dx{};
    for (int k = 0; k < 4; ++k) {
      const int64_t i = t - start + 3, lag = 3 - k;
      if (!c.apart(t + lag, t)) dx += c.taps[k] * df[i + lag];
      if (!c.apart(t - lag, t)) dx += c.taps[5 + k] * db[i - lag];
    }
    store(static_cast<S *>(p.dx) + (c.b * p.length + t) * p.channels + c.e, dx, c.lanes);
  }
  for (int64_t k = 0; k < kConvRows; ++k) store(dparameters + k * p.channels + c.e, sums[k], c.lanes);
}

template <class T, class S> void conv(const VlmConv &p, bool backward) {
  Scratch<T> taps(kConvRows * p.channels);
  arrange_taps(p, taps.data);
  const int64_t tiles = (p.length + kConvTile - 1) / kConvTile;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t task = 0; task < p.batch * tiles; ++task) {
    const int64_t b = task / tiles, start = task % tiles * kConvTile;
    const int64_t end = start + kConvTile < p.length ? start + kConvTile : p.length;
    if (!backward) {
      conv_forward_tile<T, S>(p, taps.data, b, start, end);
      continue;
    }
    T *sums = static_cast<T *>(p.dparameters) + task * kConvRows * p.channels;
    for (int64_t e = 0; e < p.channels; e += Lanes<T>::width)
      conv_backward_block(ConvTask<T, S>(p, taps.data, b, e), start, end, sums);
  }
}

}  // namespace VLM_ISA
