// One vector type a lane width, and the few functions the kernels need of it: compiled once for each instruction
// set. fp32 has its own exponential (relative error of the logarithm below 1e-6, no -ffast-math); fp64, which
// only proofs use, calls libm lane by lane.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace VLM_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

#define VLM_INLINE inline __attribute__((always_inline))

typedef float FloatVector __attribute__((vector_size(kBytes)));
typedef int32_t IntVector __attribute__((vector_size(kBytes)));
typedef double DoubleVector __attribute__((vector_size(kBytes)));

template <class T> struct Lanes;

template <> struct Lanes<float> {
  using Vector = FloatVector;
  static constexpr int width = kBytes / 4;
  // A is scaled by this once, so that a decay is one multiplication and one power of two
  static constexpr float decay_scale = 1.4426950408889634f;
  static constexpr float decay_unscale = 0.6931471805599453f;

  // 2^(x y); the product is rounded once, with the sum it goes into
  static VLM_INLINE Vector decay(Vector x, Vector y) {
#if defined(__AVX512F__)
    // 2^x = 2^floor * table[sixteenths] * polynomial(rest); the magic addend rounds to sixteenths
    const __m512 table = _mm512_setr_ps(1.0f, 1.0442737824274138f, 1.0905077326652577f, 1.1387886347566916f,
                                        1.189207115002721f, 1.241857812073484f, 1.2968395546510096f,
                                        1.3542555469368927f, 1.4142135623730951f, 1.4768261459394993f,
                                        1.5422108254079407f, 1.6104903319492543f, 1.681792830507429f,
                                        1.7562521603732995f, 1.8340080864093424f, 1.9152065613971474f);
    const __m512 magic = _mm512_set1_ps(786432.0f);
    const __m512 shifted = _mm512_fmadd_ps((__m512)x, (__m512)y, magic);
    const __m512 rounded = _mm512_sub_ps(shifted, magic);
    const __m512 rest = _mm512_fmsub_ps((__m512)x, (__m512)y, rounded);
    const __m512 step = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), table);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.05550573630947199f), rest, _mm512_set1_ps(0.24023355157723317f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.6931471802420466f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
    return (Vector)_mm512_scalef_ps(_mm512_mul_ps(p, step), rounded);
#elif defined(__AVX2__)
    const __m256 table = _mm256_setr_ps(1.0f, 1.0905077326652577f, 1.189207115002721f, 1.2968395546510096f,
                                        1.4142135623730951f, 1.5422108254079407f, 1.681792830507429f,
                                        1.8340080864093424f);
    const __m256 magic = _mm256_set1_ps(1572864.0f);
    // the operand order passes NaN on
    __m256 v = _mm256_max_ps(_mm256_set1_ps(-125.0f), (__m256)(x * y));
    v = _mm256_min_ps(_mm256_set1_ps(127.9f), v);
    const __m256 shifted = _mm256_add_ps(v, magic);
    const __m256 rest = _mm256_sub_ps(v, _mm256_sub_ps(shifted, magic));
    const __m256i bits = _mm256_castps_si256(shifted);
    const __m256 step = _mm256_permutevar8x32_ps(table, bits);
    __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(0.05551061948420502f), rest, _mm256_set1_ps(0.2402546865113812f));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(0.6931471754733048f));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_andnot_si256(_mm256_set1_epi32(7), bits), 20);
    return (Vector)_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(_mm256_mul_ps(p, step)), exponent));
#else
    const Vector low = broadcast(-125.0f), high = broadcast(127.0f), magic = broadcast(12582912.0f);
    x *= y;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vector shifted = x + magic;
    const Vector rest = x - (shifted - magic);
    Vector p = broadcast(0.0013400436348079664f) * rest + 0.009666372953656672f;
    p = p * rest + 0.05550333181506579f;
    p = p * rest + 0.24022348954812975f;
    p = p * rest + 0.693147195505439f;
    p = p * rest + 1.0f;
    return (Vector)((IntVector)p + ((IntVector)shifted << 23));
#endif
  }
  static VLM_INLINE Vector exponential(Vector x) { return decay(x, broadcast(decay_scale)); }
  // log(1 + t) for t in [0, 1]
  static VLM_INLINE Vector log1p_unit(Vector t) {
    Vector p = t * 0.005232691457328379f - 0.029505227528950972f;
    p = p * t + 0.07822593355937403f;
    p = p * t - 0.13663244240588432f;
    p = p * t + 0.19106006029715017f;
    p = p * t - 0.24842982026756527f;
    p = p * t + 0.33319096784032265f;
    p = p * t - 0.49999493139348705f;
    p = p * t + 0.9999999698794717f;
    return p * t;
  }
  static VLM_INLINE Vector minus_magnitude(Vector x) { return (Vector)((IntVector)x | INT32_MIN); }
  static VLM_INLINE Vector positive(Vector x) {
#if defined(__AVX512F__)
    // the operand order passes NaN on
    return (Vector)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x);
#else
    return x < Vector{} ? Vector{} : x;
#endif
  }
  // 1 / x where neither overflows
  static VLM_INLINE Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
    const __m512 rough = _mm512_rcp14_ps((__m512)x);
    const __m512 error = _mm512_fnmadd_ps((__m512)x, rough, _mm512_set1_ps(1.0f));
    return (Vector)_mm512_fmadd_ps(rough, error, rough);
#else
    return 1.0f / x;
#endif
  }
  static VLM_INLINE Vector broadcast(float x) { return Vector{} + x; }
};

template <> struct Lanes<double> {
  using Vector = DoubleVector;
  static constexpr int width = kBytes / 8;
  static constexpr double decay_scale = 1.0;
  static constexpr double decay_unscale = 1.0;

  static VLM_INLINE Vector decay(Vector x, Vector y) { return exponential(x * y); }
  static VLM_INLINE Vector exponential(Vector x) {
    for (int i = 0; i < width; ++i) x[i] = std::exp(x[i]);
    return x;
  }
  static VLM_INLINE Vector log1p_unit(Vector x) {
    for (int i = 0; i < width; ++i) x[i] = std::log1p(x[i]);
    return x;
  }
  static VLM_INLINE Vector minus_magnitude(Vector x) { return x < Vector{} ? x : -x; }
  static VLM_INLINE Vector positive(Vector x) { return x < Vector{} ? Vector{} : x; }
  static VLM_INLINE Vector reciprocal(Vector x) { return 1.0 / x; }
  static VLM_INLINE Vector broadcast(double x) { return Vector{} + x; }
};

template <class T> VLM_INLINE typename Lanes<T>::Vector load(const T *from) {
  typename Lanes<T>::Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T> VLM_INLINE void store(T *to, typename Lanes<T>::Vector v) { std::memcpy(to, &v, sizeof v); }

// lanes j of two vectors a and b for which bit `half` of j is off (on), b's where the bit of the target is on
template <class T, int half> struct Pairs {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
  typedef Index Mask __attribute__((vector_size(kBytes)));
  using Vector = typename Lanes<T>::Vector;
  static VLM_INLINE Vector off(Vector a, Vector b) {
    Mask mask;
#pragma GCC unroll 16
    for (int j = 0; j < Lanes<T>::width; ++j) mask[j] = j & half ? Lanes<T>::width + (j ^ half) : j;
    return __builtin_shuffle(a, b, mask);
  }
  static VLM_INLINE Vector on(Vector a, Vector b) {
    Mask mask;
#pragma GCC unroll 16
    for (int j = 0; j < Lanes<T>::width; ++j) mask[j] = j & half ? Lanes<T>::width + j : j | half;
    return __builtin_shuffle(a, b, mask);
  }
};

// swaps rows and columns of as many vectors as they have lanes: in each round, blocks of `half` across the diagonal
template <class T, int half = 1> VLM_INLINE void transpose(typename Lanes<T>::Vector *rows) {
#pragma GCC unroll 16
  for (int i = 0; i < Lanes<T>::width; ++i) {
    if (i & half) continue;
    const typename Lanes<T>::Vector a = rows[i], b = rows[i | half];
    rows[i] = Pairs<T, half>::off(a, b);
    rows[i | half] = Pairs<T, half>::on(a, b);
  }
  if constexpr (2 * half < Lanes<T>::width) transpose<T, 2 * half>(rows);
}

// a vector whose lane i is the sum of row i's lanes; destroys the rows
template <class T, int half = 1> VLM_INLINE typename Lanes<T>::Vector sum_rows(typename Lanes<T>::Vector *rows) {
#pragma GCC unroll 8
  for (int i = 0; i < Lanes<T>::width / (2 * half); ++i) {
    const typename Lanes<T>::Vector a = rows[2 * i], b = rows[2 * i + 1];
    rows[i] = Pairs<T, half>::off(a, b) + Pairs<T, half>::on(a, b);
  }
  if constexpr (2 * half < Lanes<T>::width) return sum_rows<T, 2 * half>(rows);
  else return rows[0];
}

// the first `count` lanes; the rest are zero
template <class T> VLM_INLINE typename Lanes<T>::Vector load(const T *from, int64_t count) {
  if (__builtin_expect(count == Lanes<T>::width, 1)) return load(from);
  typename Lanes<T>::Vector v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <class T> VLM_INLINE void store(T *to, typename Lanes<T>::Vector v, int64_t count) {
  if (__builtin_expect(count == Lanes<T>::width, 1)) return store(to, v);
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
}

#if defined(__AVX512F__)
VLM_INLINE FloatVector load(const float *from, int64_t count) {
  return (FloatVector)_mm512_maskz_loadu_ps((1u << count) - 1, from);
}

VLM_INLINE void store(float *to, FloatVector v, int64_t count) {
  _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)v);
}
#endif

// bf16 is only stored: it widens to fp32 when read and is rounded to nearest even when written
struct BFloat16 {
  uint16_t bits;
};
typedef uint16_t ShortVector __attribute__((vector_size(kBytes / 2)));
typedef uint32_t UnsignedVector __attribute__((vector_size(kBytes)));

template <class T> VLM_INLINE T number(T x) { return x; }

VLM_INLINE float number(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

VLM_INLINE FloatVector load(const BFloat16 *from) {
  ShortVector v;
  std::memcpy(&v, from, sizeof v);
  return (FloatVector)(__builtin_convertvector(v, UnsignedVector) << 16);
}

VLM_INLINE FloatVector load(const BFloat16 *from, int64_t count) {
  if (__builtin_expect(count == Lanes<float>::width, 1)) return load(from);
  FloatVector v{};
  for (int64_t i = 0; i < count; ++i) v[i] = number(from[i]);
  return v;
}

VLM_INLINE ShortVector rounded(FloatVector v) {
  UnsignedVector bits = (UnsignedVector)v;
  bits += 0x7FFFu + ((bits >> 16) & 1u);
  bits = v != v ? UnsignedVector{} + 0x7FC00000u : bits;
  return __builtin_convertvector(bits >> 16, ShortVector);
}

VLM_INLINE void store(BFloat16 *to, FloatVector v) {
  const ShortVector s = rounded(v);
  std::memcpy(to, &s, sizeof s);
}

VLM_INLINE void store(BFloat16 *to, FloatVector v, int64_t count) {
  const ShortVector s = rounded(v);
  if (__builtin_expect(count == Lanes<float>::width, 1)) std::memcpy(to, &s, sizeof s);
  else for (int64_t i = 0; i < count; ++i) to[i].bits = s[i];
}

// softplus and, from the same exponential, its derivative
template <class T> struct Softplus {
  using Vector = typename Lanes<T>::Vector;
  Vector value, slope;
};

template <class T> VLM_INLINE typename Lanes<T>::Vector softplus(typename Lanes<T>::Vector x) {
  return Lanes<T>::positive(x) + Lanes<T>::log1p_unit(Lanes<T>::exponential(Lanes<T>::minus_magnitude(x)));
}

template <class T> VLM_INLINE Softplus<T> softplus_with_slope(typename Lanes<T>::Vector x) {
  using Vector = typename Lanes<T>::Vector;
  const Vector t = Lanes<T>::exponential(Lanes<T>::minus_magnitude(x));
  const Vector inverse = Lanes<T>::reciprocal(t + (T)1);
  return {Lanes<T>::positive(x) + Lanes<T>::log1p_unit(t), x < Vector{} ? t * inverse : inverse};
}

template <class T> VLM_INLINE typename Lanes<T>::Vector sigmoid(typename Lanes<T>::Vector x) {
  // below this, where it is next to nothing, the exponential would leave its range
  const typename Lanes<T>::Vector least = Lanes<T>::broadcast(sizeof(T) == 4 ? -87 : -700);
  return Lanes<T>::reciprocal(Lanes<T>::exponential(-(x < least ? least : x)) + (T)1);
}

// memory for one thread, aligned to a cache line
template <class T> struct Scratch {
  explicit Scratch(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    data = static_cast<T *>(__builtin_malloc(bytes + 64));
    origin = data;
    data = reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(data) + 63) / 64 * 64);
  }
  ~Scratch() { __builtin_free(origin); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  T *data, *origin;
};

}  // namespace VLM_ISA
