"""The kernels beside others that use threads: forked children, and FAISS with its own OpenMP."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
SCAN = """
import torch
from vlm.ops import selective_scan
torch.set_num_threads(2)
torch.manual_seed(0)
u = torch.randn(2, 256, 300)
rest = (-torch.rand(256, 16), torch.randn(2, 16, 300), torch.randn(2, 16, 300))

def scan():
    x = u.clone().requires_grad_()
    out = selective_scan(x, x, *rest, delta_softplus=True)
    out.sum().backward()
    return torch.stack([out.detach(), x.grad])

"""
LOADER = """
class Scans(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return scan()

expected = scan()
loader = torch.utils.data.DataLoader(Scans(), batch_size=1, num_workers=2, multiprocessing_context="fork")
for _ in range(2):
    for found in loader:
        assert torch.equal(found[0], expected)
    assert torch.equal(scan(), expected)
print("done")
"""
# so small that no operator of torch's own uses a thread, so large that the kernels would
FORK = """
import os
import time
from vlm.ops import conv2, cpu_calls
u = torch.randn(1, 128, 40)
rest = (-torch.rand(128, 64), torch.randn(1, 64, 40), torch.randn(1, 64, 40))
x = torch.randn(1, 256, 128)
assert u.numel() * 64 >= cpu_calls._SERIAL_UPDATES and x.numel() >= cpu_calls._SERIAL_ELEMENTS

def both():
    return scan(), conv2(x, torch.ones(128, 4))[0]

expected = both()

def child():
    try:
        assert torch.get_num_threads() == 2
        assert all(torch.equal(a, b) for a, b in zip(both(), expected))
        os._exit(7)
    finally:
        os._exit(1)

pid = os.fork() or child()
deadline = time.monotonic() + 30
while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
    if time.monotonic() > deadline:
        os.kill(pid, 9)
        raise SystemExit("the child hangs")
    time.sleep(0.01)
assert os.waitstatus_to_exitcode(ended[1]) == 7
assert all(torch.equal(a, b) for a, b in zip(both(), expected))
print("done")
"""
FAISS = """
import faiss
import numpy
faiss.omp_set_num_threads(2)
vectors = numpy.random.default_rng(0).standard_normal((5000, 64), dtype=numpy.float32)
index = faiss.IndexFlatIP(64)
index.add(vectors)
"""
TURNS = """
expected, best = scan(), (vectors[:200] @ vectors.T).argmax(1)
for _ in range(5):
    assert (index.search(vectors[:200], 1)[1][:, 0] == best).all()
    assert torch.equal(scan(), expected)
print("done")
"""


def run(program, root):
    """Run a program of two threads; what hangs is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def test_forked_loader_workers_scan_after_the_parent_used_threads(root):
    run(SCAN + LOADER, root)


def test_a_bare_fork_scans_after_the_parent_used_threads(root):
    run(SCAN + FORK, root)


@pytest.mark.parametrize("parts", [(SCAN, FAISS), (FAISS, SCAN)], ids=["scan first", "faiss first"])
def test_scans_and_faiss_take_turns_in_one_process(parts, root):
    pytest.importorskip("faiss")
    run("".join(parts) + TURNS, root)
