// What a careful C++ programmer writes first: one channel at a time, its states in an array, libm's functions.
// Same layout as vlm::bi_scan with one direction: u, delta, z, out (batch, length, channels); rows
// (batch, length, 2 states) = [B | C]; A (channels, states); D, bias (channels).
#include <cmath>
#include <cstdint>
#include <vector>

extern "C" void scan(int64_t batch, int64_t length, int64_t channels, int64_t states, const float *u,
                     const float *delta, const float *z, const float *rows, const float *A, const float *D,
                     const float *bias, float *out) {
  std::vector<float> h(states);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t e = 0; e < channels; ++e) {
      for (float &x : h) x = 0;
      for (int64_t t = 0; t < length; ++t) {
        const int64_t at = (b * length + t) * channels + e;
        const float raw = delta[at] + bias[e];
        const float dt = raw > 20.0f ? raw : std::log1p(std::exp(raw));
        const float *B = rows + (b * length + t) * 2 * states, *C = B + states;
        float y = D[e] * u[at];
        for (int64_t n = 0; n < states; ++n) {
          h[n] = std::exp(dt * A[e * states + n]) * h[n] + dt * u[at] * B[n];
          y += h[n] * C[n];
        }
        out[at] = y * z[at] / (1.0f + std::exp(-z[at]));
      }
    }
}
