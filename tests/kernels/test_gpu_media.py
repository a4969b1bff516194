"""The sections of the GPU check beside the kernels: what a GPU gets wrong is found. It is played here."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from vlm.errors import InvalidInput


@pytest.fixture
def on_gpu(session):
    """A session that takes its device for a GPU."""
    made = session()
    made.device = SimpleNamespace(is_gpu=True)
    return made


class TestDecoding:
    """Frames of the GPU beside the CPU's."""

    @pytest.fixture
    def decoding(self, part, monkeypatch):
        """The section on one clip, whose GPU is the CPU; returns what each way is changed by."""
        module, changes = part("decoding"), {}
        monkeypatch.setattr(module, "CLIPS", {"h264": module.CLIPS["h264"]})
        monkeypatch.setattr("vlm.retrieval.ingest.pool.check_device", lambda device: None)
        run = subprocess.run

        def start(command, **options):
            done = run([*command[:-1], "cpu"], **options)
            clip, way = module.Path(command[-2]), command[-1]
            if way == "cuda":
                np.save(module._kept(clip, way), np.load(module._kept(clip, "cpu")) + changes.get("add", 0))
                done.stdout = json.dumps({**json.loads(done.stdout), **changes.get("said", {})})
            return done

        monkeypatch.setattr(module.subprocess, "run", start)
        workers = {"is_same": True, "fallbacks": []}
        monkeypatch.setattr(
            module, "_by_workers", lambda clip, device: {**workers, **changes.get("workers", {})}
        )
        return module.decoding, changes

    def test_equal_frames_are_right(self, decoding, on_gpu, capsys):
        found = decoding[0](on_gpu)["h264"]
        assert on_gpu.is_right and not on_gpu.is_broken and found["difference"] == 0
        assert "decoding h264: cuda" in capsys.readouterr().out

    def test_other_frames_are_wrong(self, decoding, on_gpu, capsys):
        decoding[1].update(add=np.uint8(1), said={"sha256": "other"})
        assert decoding[0](on_gpu)["h264"]["difference"] >= 1
        assert not on_gpu.is_right and "WRONG decoding h264: frames differ" in capsys.readouterr().out

    def test_other_segments_of_workers_are_wrong(self, decoding, on_gpu):
        decoding[1]["workers"] = {"is_same": False}
        decoding[0](on_gpu)
        assert not on_gpu.is_right

    @pytest.mark.parametrize(
        "change", [{"said": {"fallback": "device_refused"}}, {"workers": {"fallbacks": ["device_failed"]}}]
    )
    def test_a_gpu_that_left_it_to_the_cpu_is_no_success(self, change, decoding, on_gpu):
        decoding[1].update(change)
        decoding[0](on_gpu)
        assert on_gpu.is_right and on_gpu.is_broken

    def test_without_a_device_it_is_left_out_and_says_why(self, part, on_gpu, monkeypatch):
        def refuse(device):
            raise InvalidInput(f"cannot decode with {device!r}: no driver")

        monkeypatch.setattr("vlm.retrieval.ingest.pool.check_device", refuse)
        assert part("decoding").decoding(on_gpu) == {"left_out": "cannot decode with 'cuda': no driver"}
        assert on_gpu.is_right and not on_gpu.is_broken


class TestStructures:
    """Structures made with a GPU."""

    @pytest.fixture
    def faiss(self, monkeypatch):
        faiss = pytest.importorskip("faiss")
        monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        monkeypatch.setattr(
            faiss, "index_cpu_to_gpu", lambda _r, _d, index: faiss.clone_index(index), raising=False
        )
        monkeypatch.setattr(faiss, "pairwise_distance_gpu", lambda _r, queries, rows, **_: queries @ rows.T)
        return faiss

    def test_a_sound_gpu_is_right(self, part, on_gpu, faiss):
        found = part("structures").structures(on_gpu)
        assert on_gpu.is_right and not on_gpu.is_broken
        assert found["gpu"]["recall_at_10"] == found["cpu"]["recall_at_10"] and found["gpu"]["exact_s"] > 0

    def test_products_in_tf32_are_wrong(self, part, on_gpu, faiss, monkeypatch, capsys):
        def short(numbers):
            return (numbers.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

        def rough(_resources, queries, rows, **_):
            return short(queries) @ short(rows).T

        monkeypatch.setattr(faiss, "pairwise_distance_gpu", rough)
        part("structures").structures(on_gpu)
        assert not on_gpu.is_right and "rounded more than float32" in capsys.readouterr().out

    def test_other_hits_are_wrong(self, part, on_gpu, faiss, monkeypatch, capsys):
        def turned(_resources, queries, rows, **_):
            return -(queries @ rows.T)

        monkeypatch.setattr(faiss, "pairwise_distance_gpu", turned)
        part("structures").structures(on_gpu)
        assert not on_gpu.is_right and "gives other hits" in capsys.readouterr().out

    def test_a_gpu_that_fails_is_named(self, part, on_gpu, faiss, monkeypatch):
        def fail(*_):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(faiss, "index_cpu_to_gpu", fail, raising=False)
        found = part("structures").structures(on_gpu)
        assert on_gpu.is_right and on_gpu.is_broken and found["failure"] == "out of memory"

    def test_a_build_without_gpus_is_left_out(self, part, on_gpu):
        pytest.importorskip("faiss")
        assert part("structures").structures(on_gpu) == {"left_out": "this build of FAISS finds no GPU"}
