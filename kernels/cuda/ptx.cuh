// All of the machine that the kernels reach below C++: each function here is an instruction or two, and has a twin
// in kernels/emulation/twins.h that does the same on a CPU. NVRTC compiles these sources without any header of the
// toolkit, so half types are 16-bit words with conversions of our own.
#pragma once

namespace vlm {
struct bf16 {
  unsigned short bits;
};
struct fp16 {
  unsigned short bits;
};
}  // namespace vlm

#if defined(VLM_EMULATION)
#include "twins.h"
#else

namespace vlm {

extern __shared__ uint4 dynamic_shared[];
__device__ __forceinline__ char *shared_memory() { return reinterpret_cast<char *>(dynamic_shared); }

// 2^x with results below the normal range flushed to zero: without .ftz it costs four more instructions
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// the larger one; NaN if either is
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two neighbouring elements in one word, the first one low.
template <class T> __device__ float2 unpack(unsigned word);
template <class T> __device__ unsigned pack(float first, float second);

template <> __device__ __forceinline__ float2 unpack<bf16>(unsigned word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

template <> __device__ __forceinline__ unsigned pack<bf16>(float first, float second) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

template <> __device__ __forceinline__ float2 unpack<fp16>(unsigned word) {
  float2 v;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(word));
  return v;
}

template <> __device__ __forceinline__ unsigned pack<fp16>(float first, float second) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// c (16, 8) += a (16, 16) @ b (16, 8), spread over the warp as mma.m16n8k16 lays it out; of fp32, which is rounded to
// tf32, half as many columns in as many words, as mma.m16n8k8 lays them out
template <class T> __device__ void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

#define VLM_MMA(type, name)                                                                               \
  template <>                                                                                             \
  __device__ __forceinline__ void mma<type>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                            \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                            \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
  }
VLM_MMA(bf16, "bf16")
VLM_MMA(fp16, "f16")
#undef VLM_MMA

// left to itself the instruction would cut what tf32 has no bits for off, a bias twice as large as the rounding
__device__ __forceinline__ unsigned round_to_tf32(unsigned word) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(word)));
  return rounded;
}

template <> __device__ __forceinline__ void mma<float>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(round_to_tf32(a[0])), "r"(round_to_tf32(a[1])), "r"(round_to_tf32(a[2])), "r"(round_to_tf32(a[3])),
        "r"(round_to_tf32(b[0])), "r"(round_to_tf32(b[1])));
}

__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// bit i is lane i's answer
__device__ __forceinline__ unsigned ballot(bool answer) { return __ballot_sync(0xffffffffu, answer); }

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// `threads` threads, whole warps, wait for each other; barrier 0 is the one of __syncthreads
__device__ __forceinline__ void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

// The same number, of which the compiler knows nothing. What is computed from it inside a loop is computed there, each
// time, instead of once before the loop at the price of a register all through it.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Neighbouring words to global memory in one access, `to` a multiple of its size. Where the compiler loses sight of
// the alignment it would store them one by one.
__device__ __forceinline__ void store_words(void *to, const unsigned (&words)[2]) {
  const unsigned long long target = __cvta_generic_to_global(to);
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" : : "l"(target), "r"(words[0]), "r"(words[1]) : "memory");
}

__device__ __forceinline__ void store_words(void *to, const unsigned (&words)[4]) {
  const unsigned long long target = __cvta_generic_to_global(to);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(target), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// 16 bytes from global to shared memory without a register in between, zeros where there is no source; both
// addresses are multiples of 16. `from` is not read if it is not `there`.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool there) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(target), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// all of this lane's copies have landed except those of its `Pending` newest groups
template <int Pending> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
}

}  // namespace vlm
#endif
