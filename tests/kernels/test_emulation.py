"""The emulated GPU computes what a GPU does, and finds the mistakes it is there to find."""

from __future__ import annotations

import ctypes
import itertools
import re

import pytest
import torch

SOURCE = """
#include "ptx.cuh"

struct Probe {
  const void *in;
  void *out;
  long long kernel;
};

#define PROBE(name) __device__ void name([[maybe_unused]] const Probe &p)

__device__ float *numbers(const Probe &p) { return static_cast<float *>(p.out); }

// every lane hands its number to the next one through shared memory
__device__ void hand_on(const Probe &p, bool wait) {
  float *room = reinterpret_cast<float *>(vlm::shared_memory());
  const int lane = threadIdx.x;
  room[lane] = float(lane);
  if (wait) vlm::sync_warp();
  numbers(p)[lane] = room[(lane + 1) % 32];
}
PROBE(waits) { hand_on(p, true); }
PROBE(forgets_to_wait) { hand_on(p, false); }

PROBE(reads_unwritten) {
  numbers(p)[threadIdx.x] = reinterpret_cast<float *>(vlm::shared_memory())[threadIdx.x];
}

PROBE(writes_behind) {
  if (threadIdx.x == 0) reinterpret_cast<float *>(vlm::shared_memory())[32] = 1.0f;
}

__device__ void copy(const Probe &p, int shift, bool wait) {
  float *room = reinterpret_cast<float *>(vlm::shared_memory());
  const float *from = static_cast<const float *>(p.in) + shift;
  if (threadIdx.x < 8) vlm::copy_async(room + 4 * threadIdx.x, from + 4 * threadIdx.x, threadIdx.x < 7);
  vlm::commit_copies();
  if (wait) vlm::wait_copies<0>();
  vlm::sync_warp();
  numbers(p)[threadIdx.x] = room[threadIdx.x];
}
PROBE(copies) { copy(p, 0, true); }
PROBE(copies_misaligned) { copy(p, 1, true); }
PROBE(reads_copy_in_flight) { copy(p, 0, false); }

// two groups in flight: the older one has landed when one may be pending
PROBE(pipelines) {
  float *room = reinterpret_cast<float *>(vlm::shared_memory());
  const float *from = static_cast<const float *>(p.in);
  for (int i = 0; i < 2; ++i) {
    const int at = 16 * i + 4 * threadIdx.x;
    if (threadIdx.x < 4) vlm::copy_async(room + at, from + at, true);
    vlm::commit_copies();
  }
  vlm::wait_copies<1>();
  vlm::sync_warp();
  numbers(p)[threadIdx.x] = room[threadIdx.x];
}

PROBE(sums) {
  float x = float(threadIdx.x);
  for (int mask = 1; mask < 32; mask *= 2) x += vlm::shuffle_xor(x, mask);
  numbers(p)[threadIdx.x] = x;
}

PROBE(votes) { static_cast<unsigned *>(p.out)[threadIdx.x] = vlm::ballot(threadIdx.x % 3 == 0); }

// the warp's lanes split over two kinds of meeting
PROBE(diverges) {
  if (threadIdx.x < 16) vlm::sync_warp();
  else vlm::ballot(true);
}

PROBE(leaves_early) {
  if (threadIdx.x) __syncthreads();
}

// warp 1 writes, warps 0 and 1 meet; warp 2 goes its own way
PROBE(meets_in_pairs) {
  float *room = reinterpret_cast<float *>(vlm::shared_memory());
  if (threadIdx.x >= 64) return;
  if (threadIdx.x >= 32) room[threadIdx.x - 32] = float(threadIdx.x);
  vlm::sync_named(3, 64);
  if (threadIdx.x < 32) numbers(p)[threadIdx.x] = room[threadIdx.x];
}

template <class T> __device__ void multiply(const Probe &p) {
  const unsigned *left = static_cast<const unsigned *>(p.in), *right = left + 16 * 8;
  const int row = threadIdx.x / 4, part = threadIdx.x % 4;
  const unsigned a[4] = {left[row * 8 + part], left[(row + 8) * 8 + part], left[row * 8 + part + 4],
                         left[(row + 8) * 8 + part + 4]};
  const unsigned b[2] = {right[row * 8 + part], right[row * 8 + part + 4]};
  float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  vlm::mma<T>(c, a, b);
  for (int i = 0; i < 4; ++i) numbers(p)[(row + i / 2 * 8) * 8 + part * 2 + i % 2] = c[i];
}
PROBE(multiplies_bf16) { multiply<vlm::bf16>(p); }
PROBE(multiplies_fp16) { multiply<vlm::fp16>(p); }
PROBE(multiplies_fp32) { multiply<float>(p); }

// all 65536 halves, two in a word, widened; and narrowed again
template <class T> __device__ void convert(const Probe &p) {
  const unsigned *words = static_cast<const unsigned *>(p.in);
  for (int i = threadIdx.x; i < 32768; i += 32) {
    const float2 v = vlm::unpack<T>(words[i]);
    numbers(p)[2 * i] = v.x;
    numbers(p)[2 * i + 1] = v.y;
  }
}
template <class T> __device__ void round(const Probe &p) {
  const float *values = static_cast<const float *>(p.in);
  for (int i = threadIdx.x; i < 32768; i += 32)
    static_cast<unsigned *>(p.out)[i] = vlm::pack<T>(values[2 * i], values[2 * i + 1]);
}
PROBE(widens_bf16) { convert<vlm::bf16>(p); }
PROBE(widens_fp16) { convert<vlm::fp16>(p); }
PROBE(narrows_bf16) { round<vlm::bf16>(p); }
PROBE(narrows_fp16) { round<vlm::fp16>(p); }
"""
PROBES = re.findall(r"^PROBE\((\w+)\) {", SOURCE, re.MULTILINE)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Probe(ctypes.Structure):
    _fields_ = [("input", ctypes.c_void_p), ("out", ctypes.c_void_p), ("kernel", ctypes.c_int64)]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe") / "probe.cu"
    cases = "".join(f"  if (p.kernel == {i}) {name}(p);\n" for i, name in enumerate(PROBES))
    path.write_text(
        f'{SOURCE}\nextern "C" __global__ void probe(const __grid_constant__ Probe p) {{\n{cases}}}\n'
    )
    return path


@pytest.fixture
def run(emulate, source):
    """``run(kernel, input=None, count=32)`` on one block, returning what it wrote over NaN."""

    def call(kernel, given=None, *, count=32, dtype=torch.float32, threads=32, seed=0):
        out = (
            torch.full((count,), float("nan")) if dtype == torch.float32 else torch.empty(count, dtype=dtype)
        )
        address = None if given is None else given.data_ptr()
        problem = Probe(address, out.data_ptr(), PROBES.index(kernel))
        emulate(source, "probe", "Probe")(problem, grid=1, threads=threads, shared=128, seed=seed)
        return out

    return call


def aligned(values):
    """The values at an address that is a multiple of 64, and four more behind them."""
    room = torch.zeros(len(values) + 20)
    start = -room.data_ptr() // 4 % 16
    room[start : start + len(values)] = values
    return room[start : start + len(values) + 4]


def test_the_order_of_lanes_is_random_and_repeats(run):
    wrong = [run("forgets_to_wait", seed=seed) for seed in range(4)]
    assert all(out.isnan().any() and not out.isnan().all() for out in wrong)
    assert len({tuple(out.isnan().tolist()) for out in wrong}) == 4
    assert torch.equal(run("forgets_to_wait", seed=1).isnan(), wrong[1].isnan())
    for seed in range(4):
        assert torch.equal(run("waits", seed=seed), torch.arange(1.0, 33.0) % 32)


def test_shared_memory_starts_as_nan_and_ends_where_it_was_said_to(run):
    assert run("reads_unwritten").isnan().all()
    with pytest.raises(RuntimeError, match="behind the shared memory, byte 0"):
        run("writes_behind")


def test_copies_land_when_waited_for(run):
    values = aligned(torch.randn(32))
    expected = values[:32].clone()
    expected[28:] = 0
    assert torch.equal(run("copies", values), expected)
    assert run("reads_copy_in_flight", values).isnan().all()
    out = run("pipelines", values)
    assert torch.equal(out[:16], values[:16]) and out[16:].isnan().all()
    with pytest.raises(RuntimeError, match="multiples of 16"):
        run("copies_misaligned", values)


def test_lanes_exchange_words(run):
    assert torch.equal(run("sums"), torch.full((32,), 496.0))
    bits = sum(1 << i for i in range(0, 32, 3))
    assert run("votes", dtype=torch.int32).unique().tolist() == [bits]


def test_meetings_that_cannot_happen_are_reported(run):
    with pytest.raises(RuntimeError, match="one warp is in"):
        run("diverges")
    with pytest.raises(RuntimeError, match=r"deadlock.* 31 lanes in a barrier.* 1 lanes in the end"):
        run("leaves_early")
    with pytest.raises(RuntimeError, match="whole warps"):
        run("sums", threads=31)


def test_a_barrier_can_be_of_some_warps(run):
    for seed in range(3):
        assert torch.equal(run("meets_in_pairs", threads=96, seed=seed), torch.arange(32.0, 64.0))


@pytest.mark.parametrize("name", HALVES)
def test_matrix_product(name, run):
    left, right = torch.randn(16, 16).to(HALVES[name]), torch.randn(8, 16).to(HALVES[name])
    out = run(f"multiplies_{name}", torch.cat([left, right]).contiguous(), count=128).view(16, 8)
    assert torch.allclose(out, 1 + left.float() @ right.float().T, rtol=1e-5, atol=1e-5)


def test_a_matrix_product_of_fp32_rounds_to_tf32(run):
    torch.manual_seed(0)
    left, right = torch.randn(16, 8), torch.randn(8, 8)
    # between two neighbours, the one farther from zero is taken
    left[0, :2], right[0] = torch.tensor([1 + 2**-11, -1 - 2**-11]), torch.tensor([1.0] + [0.0] * 7)
    out = run("multiplies_fp32", torch.cat([left, right]).contiguous(), count=128).view(16, 8)
    factors = [((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (left, right)]
    assert torch.allclose(out, 1 + factors[0] @ factors[1].T, rtol=1e-6, atol=1e-6)
    assert out[0, 0] == 2 + 2**-10 and not torch.allclose(out, 1 + left @ right.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HALVES)
def test_half_types_convert_as_torch_does(name, run):
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(HALVES[name])
    wide = run(f"widens_{name}", every, count=65536)
    assert torch.equal(
        wide.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0), every.float().nan_to_num(7.0, 8.0, 9.0)
    )
    # halves themselves, what lies between two of them, and what is a little off the middle
    finite = every[every.isfinite()].float().sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    for values in (every.float(), middle, middle * (1 + 2**-20), middle * (1 - 2**-20)):
        values = torch.nn.functional.pad(values, (0, 65536 - len(values)))
        narrow = run(f"narrows_{name}", values, count=65536 // 2, dtype=torch.int32).view(HALVES[name])
        expected = values.to(HALVES[name])
        assert torch.equal(narrow.isnan(), expected.isnan())
        assert torch.equal(narrow.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))


def test_seeds_do_not_change_a_right_answer(run):
    results = [run("sums", seed=seed) for seed in range(5)]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(results))
