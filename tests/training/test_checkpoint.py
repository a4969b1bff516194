"""Checkpoints under attack: torn, changed, half written, on a full disk."""

import errno
import json

import pytest
import torch

from vlm.errors import BusyError, IntegrityError
from vlm.training.checkpoint import CheckpointStore, load_tensors, save_tensors, sole_writer, verify


def writer(text):
    def write(folder):
        (folder / "inner").mkdir()
        (folder / "a.bin").write_bytes(text.encode())
        (folder / "inner" / "b.bin").write_bytes(b"b" * 100)

    return write


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        store.save(step, writer(f"step {step}"), {"extra": step})
    return store


def test_the_newest_two_stay_with_hashes_and_a_marker(store):
    assert [path.name for path in store.list()] == ["step-00000002", "step-00000003"]
    assert (store.folder / "latest").read_text() == "step-00000003"
    manifest = verify(store.latest())
    assert manifest["step"] == 3 and manifest["extra"] == 3
    assert set(manifest["files"]) == {"a.bin", "inner/b.bin"}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "inner" / "b.bin"), "inner/b.bin does not match its checksum"),
        (lambda f: (f / "a.bin").write_bytes(b""), "a.bin has 0 bytes, expected 6"),
        (lambda f: (f / "a.bin").unlink(), "a.bin is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing or damaged"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is missing or damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is missing or damaged"),
        (lambda f: (f / "manifest.json").write_text('{"format": "x", "files": {}}'), "expected format"),
    ],
)
def test_a_damaged_newest_one_is_named_and_its_predecessor_used(store, caplog, damage, message):
    damage(store.folder / "step-00000003")
    assert store.latest().name == "step-00000002"
    assert "step-00000003" in caplog.text and message in caplog.text


def test_all_damaged_is_an_error_and_none_is_none(store, tmp_path):
    for folder in store.list():
        flip(folder / "a.bin")
    with pytest.raises(IntegrityError, match="no usable checkpoint in .*00003.*00002"):
        store.latest()
    assert CheckpointStore(tmp_path / "nothing").latest() is None


def test_a_lost_or_wrong_marker_does_not_matter(store):
    (store.folder / "latest").write_text("")
    assert store.latest().name == "step-00000003"


def test_a_failure_in_mid_write_leaves_the_old_ones_alone(store):
    def full(folder):
        (folder / "a.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", "a.bin")

    with pytest.raises(OSError, match="No space left"):
        store.save(4, full)
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "latest",
        "step-00000002",
        "step-00000003",
    ]
    assert store.latest().name == "step-00000003"


def test_leftovers_of_a_kill_are_not_taken_for_checkpoints_and_vanish(store):
    leftover = store.folder / "step-00000009.tmp"
    leftover.mkdir()
    (leftover / "a.bin").write_bytes(b"torn")
    assert store.latest().name == "step-00000003"
    store.save(4, writer("step 4"))
    assert not leftover.exists()


def test_sweeping_removes_what_is_half_there_and_no_more(store):
    (store.folder / "step-00000001").mkdir()
    (store.folder / "step-00000009.tmp").mkdir()
    flip(store.folder / "step-00000003" / "a.bin")
    store.sweep()
    left = sorted(path.name for path in store.folder.iterdir())
    assert left == ["latest", "step-00000002", "step-00000003"]
    assert store.latest().name == "step-00000002"


def test_a_damaged_step_can_be_saved_again(store):
    flip(store.folder / "step-00000003" / "a.bin")
    store.save(3, writer("again"))
    assert store.latest().name == "step-00000003"
    assert (store.latest() / "a.bin").read_bytes() == b"again"


def test_a_run_has_one_writer_at_a_time(tmp_path):
    run, busy = tmp_path / "runs" / "a", pytest.raises(BusyError, match="is being written by another process")
    with sole_writer(run), busy, sole_writer(run):
        raise AssertionError("two writers")
    with pytest.raises(OSError, match="an error"), sole_writer(run):
        raise OSError("an error")
    with sole_writer(run), sole_writer(tmp_path / "runs" / "b"):
        assert BusyError.exit_code == 75


def test_fewer_than_two_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2, got 1"):
        CheckpointStore(tmp_path, keep=1)


def test_tensor_files_execute_nothing(tmp_path):
    save_tensors(tmp_path / "state.pt", {"weights": [torch.arange(3)], "step": 4})
    state = load_tensors(tmp_path / "state.pt")
    assert state["step"] == 4 and torch.equal(state["weights"][0], torch.arange(3))

    class Evil:
        def __reduce__(self):
            return (json.loads, ("1",))

    torch.save({"evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_tensors(tmp_path / "evil.pt")
