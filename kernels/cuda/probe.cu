// Proves the way from the host to a GPU once a process: the argument's bytes, the grid, more dynamic shared memory
// than a kernel gets without asking, and the stream. Each block writes its elements through shared memory.
struct Probe {
  unsigned *out;    // count elements
  long long count;
  unsigned seed;
  int last;         // index of the last unsigned of the dynamic shared memory
};

extern __shared__ unsigned room[];

extern "C" __global__ void __launch_bounds__(128) vlm_probe(const __grid_constant__ Probe p) {
  const long long first = static_cast<long long>(blockIdx.x) * blockDim.x;
  room[p.last - threadIdx.x] = static_cast<unsigned>(first + threadIdx.x) * 2654435761u ^ p.seed;
  __syncthreads();
  // a thread reads what another one wrote
  const int other = blockDim.x - 1 - threadIdx.x;
  if (first + other < p.count) p.out[first + other] = room[p.last - other];
}
