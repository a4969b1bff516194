"""Parts of the GPU check by themselves: the published rival, its build, and what is asked of a GPU."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from vlm.ops.cuda import arguments as cuda_arguments
from vlm.ops.cuda import library as cuda_library

TIMED = {
    "scan": ("forward", "backward", "forward_backward"),
    "block": ("forward", "forward_backward"),
    "encoder": ("forward", "forward_backward"),
}


class Built:
    """A build that ended."""

    def __init__(self, reason, into):
        self.reason, self.into = reason, into

    def wait(self, _seconds):
        return self.reason


def test_what_was_built_is_the_rival_once_it_gives_our_numbers(
    program, part, session, extensions, tmp_path, monkeypatch
):
    monkeypatch.setattr(part("rival"), "SIZES", {"Ti": part("problems").Size("tiny", 16)})
    made = session("chunked", build=Built("", tmp_path))
    assert part("rival").admit(made) == {"rival": "official"}
    assert list(made.rivals) == ["official"] and extensions.calls == 2
    for section, jobs in TIMED.items():
        row = program.SECTIONS[section][0](made)["Ti B1 T2"]
        for job in jobs:
            assert (section, job) == ("scan", "backward") or row[job]["official"]["ratio"] > 0
    assert made.is_right
    counted = part("launches").launches(made)["block_forward"]
    assert "vlm::bi_scan" in counted["chunked"]["of"] and "vlm::bi_scan" not in counted["official"]["of"]


def test_what_was_built_and_gives_other_numbers_is_not_the_rival(part, session, extensions, tmp_path):
    right = extensions.fwd
    extensions.fwd = lambda *arguments: (lambda y, x, gated: (y, x, 1.5 * gated))(*right(*arguments))
    made = session("chunked", build=Built("", tmp_path))
    found = part("rival").admit(made)
    assert found["rival"] == "chunked" and "its numbers differ from ours" in found["reason"]
    assert list(made.rivals) == ["chunked"]


def test_what_was_not_built_says_why(part, session, tmp_path):
    found = part("rival").admit(session(build=Built("not built: there is no nvcc", tmp_path)))
    assert found == {"rival": "chunked", "reason": "not built: there is no nvcc"}
    found = part("rival").admit(session("chunked", build=Built("", tmp_path)))
    assert "built, but not to be used: ModuleNotFoundError" in found["reason"]


def test_a_build_goes_on_beside_and_ends_in_time(part, tmp_path, monkeypatch):
    build = part("build")
    begun = build.Build(tmp_path, tmp_path / "into", "sm_90", 60)
    assert "not built: " in begun.wait(60) and begun.wait(0) != ""
    hanging = tmp_path / "hang.py"
    hanging.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(build, "BUILDER", hanging)
    start = time.perf_counter()
    begun = build.Build(tmp_path, tmp_path / "into", "sm_90", 60)
    assert begun.wait(0.1) == "not built: time is up" and time.perf_counter() - start < 30
    assert begun._process.poll() is not None


class Event:
    """A CUDA event on a clock that goes three milliseconds a record."""

    clock = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        Event.clock += 3.0
        self.at = Event.clock

    def synchronize(self):
        """It has happened."""

    def elapsed_time(self, other):
        return other.at - self.at


def test_what_is_asked_of_a_gpu(part, monkeypatch):
    """With the names that PyTorch has: a fake is put only where there is something."""
    memory = iter([2**20, 5 * 2**20])
    about = SimpleNamespace(name="a GPU", multi_processor_count=132, total_memory=80 * 2**30)
    called = []
    for name, value in {
        "Event": Event,
        "synchronize": lambda _place: called.append("synchronize"),
        "empty_cache": lambda: called.append("empty_cache"),
        "reset_peak_memory_stats": lambda _place: called.append("reset"),
        "memory_allocated": lambda _place: next(memory),
        "max_memory_allocated": lambda _place: next(memory),
        "get_device_properties": lambda _place: about,
        "get_device_capability": lambda _place: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    asked = part("device")
    monkeypatch.setattr(asked, "_query", lambda field: {"clocks.max.sm": "1980"}.get(field, "570.1"))
    device = asked.Device(torch.device("cuda"))
    figures = device.time_ms(lambda: None, 0.0)
    assert figures == {"median_ms": 3.0, "least_ms": 3.0, "spread_ms": 0.0, "runs": 3}
    assert device.peak_mib(lambda: called.append("run")) == 4.0
    assert called[-4:] == ["empty_cache", "reset", "run", "synchronize"]
    assert device.host_us(lambda: None, 10) > 0
    assert device.architecture() == "sm_90"
    assert device.clocks_per_s() == pytest.approx(1.98e9 * 132)
    assert device.describe()["gpu"] == "a GPU" and device.describe()["driver"] == "570.1"
    assert part("operators")._floor_ms(SimpleNamespace(device=device), 100, 17.5, 16) > 0


def test_launches_are_what_a_profile_says_of_the_gpu(part, monkeypatch):
    asked = part("device")
    kernel = SimpleNamespace(name="vlm_scan_forward", device_type=asked.DeviceType.CUDA, cpu_parent=None)
    host = SimpleNamespace(name="aten::mm", device_type=asked.DeviceType.CPU, cpu_parent=None)

    class Profile:
        def __init__(self, activities):
            assert set(activities) == {asked.ProfilerActivity.CPU, asked.ProfilerActivity.CUDA}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            """Ends."""

        def events(self):
            return [host, kernel, kernel]

    monkeypatch.setattr(asked, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _place: None)
    device = asked.Device(torch.device("cuda"))
    assert device.launches(lambda: None) == ["vlm_scan_forward"] * 2


def test_a_gpu_that_must_not_be_profiled_still_gives_the_hosts_time(part, session, monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(part("device"), "profile", refused)
    made = session("chunked")
    found = part("launches").launches(made)
    assert made.is_broken and found["host_us"]["conv2"] > 0
    assert found["block_forward"] == {"error": "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"}


def test_the_gpus_own_paths_of_sections(part, session, monkeypatch):
    """What only a GPU reaches: compiling beforehand, and the bare launch."""
    made = session("cuda")
    made.device.is_gpu = True
    asked = []

    def prepared(index, wanted):
        asked.append((index, len(wanted)))
        return cuda_library.Preparation(len(wanted), 3, 1.5)

    monkeypatch.setattr(cuda_library, "library", lambda: SimpleNamespace(prepare=prepared))
    found = part("prepare").prepare(made)
    assert found == {"kernels": asked[0][1], "compiled": 3, "seconds": 1.5} and asked[0][0] == 0
    launched = []
    kernel = SimpleNamespace(launch=lambda *given: launched.append(given))
    monkeypatch.setattr(cuda_library, "kernel", lambda *_: kernel)
    part("launches")._bare_launch(made)()
    assert launched[0][1] == (128, 1, 1)


def test_the_gpu_is_put_back_as_it_was(part):
    correctness, before = part("correctness"), cuda_arguments.multiprocessors
    torch.utils.deterministic.fill_uninitialized_memory = False  # as a training leaves it
    with pytest.raises(RuntimeError), correctness._as_on("empty"), correctness.poisoned():
        assert cuda_arguments.multiprocessors(None) == 10**6 and torch.empty(9).isnan().all()
        raise RuntimeError
    assert cuda_arguments.multiprocessors is before
    assert not torch.are_deterministic_algorithms_enabled()
