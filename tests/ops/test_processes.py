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


@pytest.mark.parametrize("parts", [(SCAN, FAISS), (FAISS, SCAN)], ids=["scan first", "faiss first"])
def test_scans_and_faiss_take_turns_in_one_process(parts, root):
    pytest.importorskip("faiss")
    run("".join(parts) + TURNS, root)
