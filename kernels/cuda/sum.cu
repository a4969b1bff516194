// Adds up the parts that the backward pass leaves, each sum by one thread in the order of the parts.
#include "problem.cuh"
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(vlm::kSumThreads) vlm_sum(const __grid_constant__ vlm::PartialSums p) {
  using namespace vlm;
  long long block = blockIdx.x;
  int which = 0;
  for (; which < p.count; ++which) {
    const long long blocks = (p.of[which].size + kSumThreads - 1) / kSumThreads;
    if (block < blocks) break;
    block -= blocks;
  }
  if (which == p.count) return;
  const PartialSum &q = p.of[which];
  const long long i = block * kSumThreads + threadIdx.x;
  if (i >= q.size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (long long part = 0; part < q.count; ++part) sum += q.parts[part * q.size + i];
  const long long to = i / q.columns * q.row + i % q.columns;
  if (q.stored) static_cast<Io *>(q.sum)[to] = Pairs<Io>::narrow(sum);
  else static_cast<float *>(q.sum)[to] = sum;
}
