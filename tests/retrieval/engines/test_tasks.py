"""A build by tasks equals a local one, whatever happened to its workers; files alone say what is done."""

from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlm.errors import BusyError, IntegrityError, InvalidInput
from vlm.retrieval import VideoIndex
from vlm.retrieval.durability import WriterLock
from vlm.retrieval.engines.driving import build_by_tasks
from vlm.retrieval.engines.tasks import LIST_NAME, EmbedOptions, read_tasks, write_tasks
from vlm.retrieval.engines.working import do_task
from vlm.retrieval.ingest.scanning import tasks_folder

OPTIONS = EmbedOptions()


def here(model, order=None):
    """An engine that does the tasks in this process."""

    def run(listing, missing) -> str:
        for task in missing if order is None else [missing[i] for i in order if i < len(missing)]:
            do_task(listing, task, lambda: model)
        return "elsewhere"

    return run


def nowhere(listing, missing) -> str:
    return "nobody works"


def by_tasks(folder, paths, engine, model, **options):
    is_there = (folder / "manifest.json").exists()
    index = VideoIndex.open(folder) if is_there else VideoIndex.create(folder, model)
    options = {"options": OPTIONS, "files_per_task": 3, **options}
    return build_by_tasks(index, paths, engine, model, **options)


def test_equals_a_local_build(films, tmp_path, make_encoder, state, local) -> None:
    model = make_encoder()
    progress = by_tasks(tmp_path / "index", [films], here(model), model)
    report, truth = progress.report, local(tmp_path / "local", [films])
    assert (report.num_added, report.num_updated, progress.num_tasks) == (7, 0, 3)
    assert [os.path.basename(r.path) for r in report.rejected] == [b"broken.mp4"]
    assert state(tmp_path / "index") == truth
    # in the same order, too; each segment was embedded once, and one clip when the index was made
    orders = [
        [v.path for v in VideoIndex.open(tmp_path / name).snapshot.videos] for name in ("index", "local")
    ]
    assert orders[0] == orders[1] and model.num_clips == report.num_segments + 1
    assert not tasks_folder(tmp_path / "index").exists()
    # again: nothing new but the file that is still broken
    again = by_tasks(tmp_path / "index", [films], here(model), model)
    assert (again.report.num_added, again.report.num_unchanged, again.num_tasks) == (0, 7, 1)
    assert len(again.report.rejected) == 1 and state(tmp_path / "index") == truth


def test_any_order_and_parts_joined_as_they_come(films, tmp_path, make_encoder, state, local) -> None:
    model, index = make_encoder(), tmp_path / "index"
    progress = by_tasks(index, [films], here(model, order=[2]), model)
    assert (progress.report, progress.num_done, progress.num_tasks) == (None, 1, 3)
    assert progress.rest == "elsewhere"
    # what is done can be searched, and its part is gone
    assert VideoIndex.open(index).info()["num_videos"] == 1
    task = read_tasks(tasks_folder(index)).task(2)
    assert task.joined() is not None and not any(entry.is_dir() for entry in task.folder.iterdir())
    assert do_task(read_tasks(tasks_folder(index)), task, pytest.fail) is False
    report = by_tasks(index, [films], here(model, order=[1, 0]), model).report
    assert report.num_added == 7 and len(report.rejected) == 1
    assert state(index) == local(tmp_path / "local", [films])
    assert model.num_clips == report.num_segments + 1


def test_files_that_change_between(films, tmp_path, make_encoder, state, local, clip, colours) -> None:
    """Changed and gone after the plan, new after the plan, changed after the build, renamed, mended."""
    model, index = make_encoder(), tmp_path / "index"
    by_tasks(index, [films], nowhere, model)
    clip(films / "0.mp4", [(colours.blue, 7)])
    (films / "1.mp4").unlink()
    clip(films / "new.mp4", [(colours.red, 6)])
    report = by_tasks(index, [films], here(model), model).report
    assert (report.num_added, {r.reason for r in report.rejected}) == (7, {"missing", "not_a_video"})
    held = {os.path.basename(v.path) for v in VideoIndex.open(index).snapshot.videos}
    assert {b"0.mp4", b"new.mp4"} < held and b"1.mp4" not in held
    truth = local(tmp_path / "local", [films])
    now = state(index)
    assert (now["contents"], now["paths"], now["seen"]) == (truth["contents"], truth["paths"], truth["seen"])
    # the second build, beside a local one of the same history
    clip(films / "3.mp4", [(colours.yellow, 9)])
    (films / "4.mp4").write_text("broken now")
    clip(films / "broken.mp4", [(colours.green, 6)])
    (films / "5.mp4").rename(films / "six.mp4")
    by_local = VideoIndex.open(tmp_path / "local").add([films], model=make_encoder())
    model.num_clips = 0
    report = by_tasks(index, [films], here(model), model, files_per_task=1).report
    assert (report.num_added, report.num_updated, report.num_renamed) == (1, 1, 1)
    assert (report.num_unchanged, len(report.rejected)) == (by_local.num_unchanged, 1)
    assert model.num_clips == report.num_segments == by_local.num_segments
    now, truth = state(index), state(tmp_path / "local")
    gone = [entry for entry in now["rejected"] if entry["reason"] == "missing"]
    assert len(gone) == 1  # the file that vanished before the task; the local build never saw it
    assert [entry for entry in now["rejected"] if entry not in gone] == truth["rejected"]
    names = ("contents", "paths", "roots", "seen")
    assert [now[name] for name in names] == [truth[name] for name in names]


@pytest.mark.parametrize(
    "point", ["after-encode", "before-commit:2", "after-commit", "before-task-done", "before-fsync:6"]
)
def test_a_killed_task_goes_on(films, tmp_path, make_encoder, state, local, build_process, point) -> None:
    model, index = make_encoder(), tmp_path / "index"
    by_tasks(index, [films], nowhere, model, files_per_task=8)
    words = {"COMMAND": f"index task {tasks_folder(index)} --number 0 --json", "PART_SEGMENTS": "3"}
    killed = build_process(index, CRASH_AT=point, **words)
    assert killed.returncode == -9
    assert read_tasks(tasks_folder(index)).missing()
    resumed = build_process(index, **words)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout) == {"num_done": 1, "num_done_before": 0, "num_busy": 0}
    assert json.loads(build_process(index, **words).stdout)["num_done_before"] == 1
    assert by_tasks(index, [films], nowhere, model).report.num_added == 7
    assert state(index) == local(tmp_path / "local", [films])


@pytest.mark.parametrize(
    "point", ["after-task-list", "after-merged-part", "before-task-joined", "before-commit:2"]
)
def test_a_killed_driver_goes_on(films, tmp_path, make_encoder, state, local, build_process, point) -> None:
    model, index = make_encoder(), tmp_path / "index"
    command = f"index build {films} --out {index} --model colours --engine tasks --files-per-task 3 --json"
    if point == "after-task-list":
        assert build_process(index, COMMAND=command, CRASH_AT=point).returncode == -9
    assert build_process(index, COMMAND=command).returncode == 75
    listing = read_tasks(tasks_folder(index))
    for task in listing.tasks:
        assert do_task(listing, task, lambda: model) is True
    if point != "after-task-list":
        assert build_process(index, COMMAND=command, CRASH_AT=point).returncode == -9
    done = build_process(index, COMMAND=command)
    assert done.returncode == 3, done.stderr
    assert [entry["path"] for entry in json.loads(done.stdout)["rejected"]] == [str(films / "broken.mp4")]
    assert state(index) == local(tmp_path / "local", [films])


def test_two_workers_at_one_task(films, tmp_path, make_encoder, state, local, monkeypatch) -> None:
    model, index = make_encoder(), tmp_path / "index"
    by_tasks(index, [films], nowhere, model)
    listing = read_tasks(tasks_folder(index))
    task = listing.task(0)
    place = task.folder / socket.gethostname()
    place.mkdir()
    with WriterLock(place), pytest.raises(BusyError, match="is being written by process"):
        do_task(listing, task, pytest.fail)
    # on two machines both go on, and either's part will do: here the other ends first, while this one works
    inner = make_encoder()

    def meanwhile():
        monkeypatch.setattr(socket, "gethostname", lambda: "other-machine")
        assert do_task(listing, task, lambda: inner)
        monkeypatch.undo()
        return model

    assert do_task(listing, task, meanwhile)
    assert inner.num_clips == model.num_clips - 1 > 0  # one when the index was made
    parts = {entry.name for entry in task.folder.iterdir() if entry.is_dir()}
    assert parts == {socket.gethostname(), "other-machine"}
    assert by_tasks(index, [films], here(model), model).report.num_added == 7
    assert state(index) == local(tmp_path / "local", [films])


def test_a_dead_machine_holds_up_nobody(films, tmp_path, make_encoder, monkeypatch) -> None:
    """Its lock stays for ever, as on a shared disk where the kernel's lock does not reach."""
    model, index = make_encoder(), tmp_path / "index"
    by_tasks(index, [films], nowhere, model)
    listing = read_tasks(tasks_folder(index))
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "dead-machine")
        with pytest.raises(KeyboardInterrupt):
            do_task(listing, listing.task(0), interrupt)
        dead = listing.task(0).folder / "dead-machine" / "writer.lock"
        dead.write_text(json.dumps({"pid": 1, "host": "dead-machine"}))
    assert do_task(listing, listing.task(0), lambda: model) is True


def interrupt():
    raise KeyboardInterrupt


def test_torn_and_unknown(films, tmp_path, make_encoder, state, local) -> None:
    model, index = make_encoder(), tmp_path / "index"
    folder = tasks_folder(index)
    by_tasks(index, [films], nowhere, model)
    listing = read_tasks(folder)
    for number in (-1, 3):
        with pytest.raises(InvalidInput, match=rf"has tasks 0 to 2, got number {number}"):
            listing.task(number)
    with pytest.raises(InvalidInput, match="holds no list of tasks.*--engine"):
        read_tasks(films)
    with pytest.raises(InvalidInput, match="the model at hand is 'colours'"):
        do_task(listing, listing.task(0), lambda: make_encoder(fingerprint="other" * 8))
    # a task's list, a mark, a part, the whole list: each torn
    path = listing.task(0).folder / "task.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(IntegrityError, match=r"task\.json: missing or torn; delete .*tasks\.json and run"):
        do_task(listing, listing.task(0), pytest.fail)
    path.write_bytes(whole)
    do_task(listing, listing.task(0), lambda: model)
    mark = listing.task(0).folder / "done.json"
    mark.write_bytes(mark.read_bytes()[:20])
    assert listing.task(0).done() is None and do_task(listing, listing.task(0), lambda: model)
    vectors = next(listing.task(0).folder.glob("*/part/vectors/*.npy"))
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"\xff")
    with pytest.raises(
        IntegrityError, match="it is discarded, and the same command embeds its 3 files again"
    ):
        by_tasks(index, [films], nowhere, model)
    assert len(listing.missing()) == 3
    # the list is lost: what was done is found again by its hash
    do_task(listing, listing.task(1), lambda: model)
    clips = model.num_clips
    (folder / LIST_NAME).write_text("{}")
    with pytest.raises(IntegrityError, match="missing or torn"):
        by_tasks(index, [films], nowhere, model)
    (folder / LIST_NAME).unlink()
    assert by_tasks(index, [films], here(model), model).report.num_added == 7
    assert model.num_clips - clips < VideoIndex.open(index).info()["num_segments"]
    assert state(index) == local(tmp_path / "local", [films])


def test_other_options_plan_anew_while_nothing_is_done(films, tmp_path, make_encoder) -> None:
    model, index = make_encoder(), tmp_path / "index"
    by_tasks(index, [films], nowhere, model)
    allowed = EmbedOptions(allow_narrow_model=True, num_workers=2)
    by_tasks(index, [films], nowhere, model, options=allowed)
    listing = read_tasks(tasks_folder(index))
    assert listing.options == allowed
    do_task(listing, listing.task(0), lambda: model)
    with pytest.raises(InvalidInput, match="planned with other options, and some are done"):
        by_tasks(index, [films], nowhere, model)
    with (
        WriterLock(tasks_folder(index)),
        pytest.raises(BusyError),
    ):
        by_tasks(index, [films], nowhere, model, options=allowed)


def test_the_hash_tells_what_decides_the_vectors(films, tmp_path, make_encoder) -> None:
    files = sorted(films.iterdir())
    manifest = VideoIndex.create(tmp_path / "a", make_encoder()).manifest
    other = VideoIndex.create(tmp_path / "b", make_encoder(), segment_s=4, stride_s=4).manifest

    def hashes(name, manifest=manifest, files=files, **options):
        listing = write_tasks(
            tmp_path / name, manifest, files, options=EmbedOptions(**options), files_per_task=4
        )
        assert read_tasks(tmp_path / name) == listing
        return [task.hash for task in listing.tasks]

    first = hashes("first")
    assert len(first) == 2 and hashes("again") == first == hashes("workers", num_workers=3)
    assert not set(first) & set(hashes("batch", batch_size=4)) and not set(first) & set(hashes("m", other))
    os.utime(files[0], ns=(1, 1))
    assert [a == b for a, b in zip(hashes("touched"), first, strict=True)] == [False, True]


def test_the_command_line(films, tmp_path, call_vlm, monkeypatch, state, local, make_encoder) -> None:
    index, tasks = str(tmp_path / "index"), str(tmp_path / "index.tasks")
    build = ("index", "build", str(films), "--out", index, "--model", "colours", "--engine", "tasks")
    assert call_vlm(*build, "--files-per-task", "0")[0] == 2
    code, _, errors = call_vlm(*build, "--files-per-task", "2")
    assert code == 75 and "0 of 4 tasks are done; have vlm index task" in errors
    assert call_vlm("index", "task", tasks)[0] == 2
    assert call_vlm("index", "task", tasks, "--number", "4")[0] == 4
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert call_vlm("index", "task", tasks, "--step", "2")[:2] == (0, "2 tasks done, 0 were done before\n")
    assert call_vlm("index", "task", tasks, "--step", "0")[0] == 2
    assert call_vlm(*build)[0] == 75
    code, output, _ = call_vlm("index", "task", tasks, "--number", "0", "--step", "1", "--json")
    assert json.loads(output) == {"num_done": 2, "num_done_before": 2, "num_busy": 0}
    code, output, _ = call_vlm(*build)
    assert code == 3 and output.startswith("7 added, 0 updated") and "broken.mp4" in output
    assert state(Path(index)) == local(tmp_path / "local", [films])


def test_workers_side_by_side(films, tmp_path, make_encoder, state, local) -> None:
    """Four workers at the same tasks at once: each is done by one of them, the others go past it."""
    model, index = make_encoder(), tmp_path / "index"
    by_tasks(index, [films], nowhere, model)
    listing = read_tasks(tasks_folder(index))

    def work(_: int) -> list[str]:
        outcomes = []
        for task in listing.tasks:
            try:
                outcomes.append("done" if do_task(listing, task, lambda: model) else "was done")
            except BusyError:
                outcomes.append("busy")
        return outcomes

    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(work, range(4)))
    assert [sorted(each).count("done") for each in zip(*outcomes, strict=True)] == [1, 1, 1]
    assert by_tasks(index, [films], nowhere, model).report.num_added == 7
    assert state(index) == local(tmp_path / "local", [films])
