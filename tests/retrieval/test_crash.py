"""A build that is killed, starved of space or interrupted leaves an index that opens, and can be finished."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time

import pytest

from vlm.retrieval import Searcher, VideoIndex

# every point where the state on the disk changes, or is about to
POINTS = [
    "after-encode", "before-fsync", "before-rename", "after-rename", "before-fsync:4", "after-part",
    "after-part:2", "before-commit", "before-commit:2", "after-commit", "after-commit:2",
]  # fmt: skip


@pytest.fixture(scope="session")
def many(tmp_path_factory, request):
    """Seven short videos and two broken files."""
    from PIL import ImageColor

    write_clip = request.getfixturevalue("clip_writer")
    folder = tmp_path_factory.mktemp("many")
    for number in range(7):
        colour = ImageColor.getrgb(f"hsl({number * 50}, 80%, 50%)")
        write_clip(folder / f"{number}.mp4", [(colour, 2), (colour[::-1], 9)])
    (folder / "3-broken.mp4").write_text("broken")
    (folder / "5-empty.mp4").touch()
    return folder


@pytest.fixture(scope="session")
def undisturbed(many, build_process, tmp_path_factory, contents):
    """The contents of an index whose build nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "index"
    done = build_process(folder, many, PART_SEGMENTS="4")
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    assert (report["num_added"], len(report["rejected"])) == (7, 2)
    result = contents(folder)
    assert len(result) == 7
    return result


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_run_again_equals_undisturbed(
    point, many, undisturbed, build_process, tmp_path, contents
) -> None:
    folder = tmp_path / "index"
    killed = build_process(folder, many, PART_SEGMENTS="4", CRASH_AT=point)
    assert killed.returncode == -signal.SIGKILL
    held = {}
    if (folder / "manifest.json").exists():
        # what was acknowledged is there, whole, and can be searched while nobody has repaired anything
        index = VideoIndex.open(folder)
        assert index.verify() == []
        held = contents(folder)
        assert held.items() <= undisturbed.items()
        assert len(held) == index.info()["num_videos"]
    again = build_process(folder, many, PART_SEGMENTS="4")
    assert again.returncode == 3, again.stderr
    report = json.loads(again.stdout)
    assert (report["num_unchanged"], report["num_added"]) == (len(held), 7 - len(held))
    assert contents(folder) == undisturbed
    index = VideoIndex.open(folder)
    assert index.verify() == []
    assert index.info()["num_rejected"] == 2
    known = {file.name for file in index.files()}
    there = {str(p.relative_to(folder)) for kind in ("vectors", "tokens") for p in (folder / kind).iterdir()}
    assert there == known


def test_killed_at_random_times_equals_undisturbed(
    many, undisturbed, build_process, tmp_path, contents
) -> None:
    rng, held, num_kills = random.Random(8), {}, 0
    for _ in range(8):
        delay = f"{rng.uniform(0.02, 0.9):.3f}"
        done = build_process(tmp_path / "i", many, PART_SEGMENTS="4", KILL_AFTER_S=delay, SLOW_S="0.02")
        assert done.returncode in (-signal.SIGKILL, 3), done.stderr
        num_kills += done.returncode != 3
        if (tmp_path / "i" / "manifest.json").exists():
            assert VideoIndex.open(tmp_path / "i").verify() == []
            now = contents(tmp_path / "i")
            assert held.items() <= now.items() <= undisturbed.items()
            held = now
    assert num_kills > 2
    assert build_process(tmp_path / "i", many, PART_SEGMENTS="4").returncode == 3
    assert contents(tmp_path / "i") == undisturbed
    assert VideoIndex.open(tmp_path / "i").verify() == []


@pytest.mark.parametrize("size", [100, 700, 5000, 40_000, 70_000])
def test_a_full_disk_leaves_the_old_index_usable(
    size, many, undisturbed, build_process, tmp_path, contents, make_encoder
) -> None:
    folder = tmp_path / "index"
    assert build_process(folder, many / "0.mp4").returncode == 0
    before = contents(folder)
    full = build_process(folder, many, PART_SEGMENTS="4", FILE_SIZE=str(size))
    assert full.returncode == 6, (full.returncode, full.stderr)
    assert "no space left" in full.stderr and "Traceback" not in full.stderr
    index = VideoIndex.open(folder)
    assert index.verify() == []
    held = contents(folder)
    assert before.items() <= held.items() and held.keys() <= undisturbed.keys()
    assert Searcher(index, make_encoder()).search("red")
    assert not list(folder.rglob(".tmp-*"))
    assert build_process(folder, many).returncode == 3
    assert contents(folder).keys() == undisturbed.keys()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_is_committed(
    number, code, many, undisturbed, build_command, build_process, tmp_path, contents
) -> None:
    folder = tmp_path / "index"
    command, environment = build_command(folder, many, PART_SEGMENTS="1", SLOW_S="0.3")
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob("vectors/0*.npy")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors and "run the same command again" in errors
    held = contents(folder)
    assert held.keys() < undisturbed.keys()
    assert build_process(folder, many, PART_SEGMENTS="1").returncode == 3
    assert contents(folder).keys() == undisturbed.keys()
