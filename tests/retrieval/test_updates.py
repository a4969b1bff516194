"""What an update costs and keeps: contents decide, names and times only speed it up."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import pytest

from vlm.errors import InvalidInput
from vlm.retrieval import Searcher, VideoIndex


@pytest.fixture
def world(tmp_path, clip, colours, make_encoder):
    """A folder of three videos of different colours and their index."""
    folder, model = tmp_path / "v", make_encoder()
    for name in ("red", "green", "blue"):
        clip(folder / f"{name}.mp4", [(getattr(colours, name), 2)])
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([folder], model=model)
    model.num_clips = 0
    return folder, index, model


def state(index: VideoIndex, contents) -> dict[str, tuple[str, str]]:
    """Return identifier and content by file name."""
    found = contents(index.folder)
    return {
        os.path.basename(os.fsdecode(v.path)): (v.video_id, found[v.video_id])
        for v in VideoIndex.open(index.folder).snapshot.videos
    }


@pytest.mark.parametrize("how", ["update", "add"])
def test_a_renamed_file_keeps_its_identifier_and_vectors(world, contents, how) -> None:
    folder, index, model = world
    before = state(index, contents)
    (folder / "red.mp4").rename(folder / "deep.mp4")
    (folder / "sub").mkdir()
    (folder / "blue.mp4").rename(folder / "sub" / "blue.mp4")
    report = index.update(model=model) if how == "update" else index.add([folder], model=model)
    assert (report.num_renamed, report.num_unchanged, report.num_added, report.num_removed) == (2, 1, 0, 0)
    assert model.num_clips == 0
    after = state(index, contents)
    assert after == {"deep.mp4": before["red.mp4"]} | {k: before[k] for k in ("green.mp4", "blue.mp4")}
    hit = Searcher(index, model).search("red", rerank=1)[0]
    assert hit.path == str(folder / "deep.mp4")
    assert index.verify() == []
    assert index.update(model=model).num_unchanged == 3


def test_files_that_change_places(world, contents) -> None:
    folder, index, model = world
    before = state(index, contents)
    for a, b in (("red", "tmp"), ("green", "red"), ("tmp", "green")):
        (folder / f"{a}.mp4").rename(folder / f"{b}.mp4")
    report = index.update(model=model)
    assert (report.num_renamed, report.num_unchanged, model.num_clips) == (2, 1, 0)
    after = state(index, contents)
    assert (after["red.mp4"], after["green.mp4"]) == (before["green.mp4"], before["red.mp4"])
    assert index.verify() == [] and len(Searcher(index, model).search("red")) == 3


def test_a_new_file_in_the_place_of_a_moved_one(world, clip, colours, contents) -> None:
    folder, index, model = world
    before = state(index, contents)
    (folder / "red.mp4").rename(folder / "moved.mp4")
    clip(folder / "red.mp4", [(colours.yellow, 3)])
    report = index.update(model=model)
    assert (report.num_renamed, report.num_added, report.num_unchanged, model.num_clips) == (1, 1, 2, 1)
    after = state(index, contents)
    assert after["moved.mp4"] == before["red.mp4"]
    assert after["red.mp4"][0] not in {name for name, _ in before.values()}


def test_a_copy_is_another_video_and_a_rename_over_a_rejected_file_clears_it(world) -> None:
    folder, index, model = world
    (folder / "odd.mp4").write_text("broken")
    (folder / "copy.mp4").write_bytes((folder / "red.mp4").read_bytes())
    report = index.update(model=model)
    assert (report.num_renamed, report.num_added, len(report.rejected)) == (0, 1, 1)
    (folder / "green.mp4").replace(folder / "odd.mp4")
    report = index.update(model=model)
    assert (report.num_renamed, report.rejected) == (1, ())
    assert index.info()["num_rejected"] == 0


def test_rehash_looks_behind_an_unchanged_time(world, clip, colours, tmp_path) -> None:
    folder, index, model = world
    path = folder / "red.mp4"
    times, size = path.stat(), path.stat().st_size
    other = clip(tmp_path / "other.mp4", [(colours.yellow, 2)]).read_bytes()
    path.write_bytes(other[:size].ljust(size, b"\0"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert index.update(model=model).num_unchanged == 3
    report = index.update(model=model, rehash=True)
    assert (report.num_unchanged, report.num_updated + len(report.rejected)) == (2, 1)
    assert index.update(model=model, rehash=True).num_updated == 0


def test_a_file_named_outright_is_followed_and_forgotten(tmp_path, clip, colours, make_encoder) -> None:
    model = make_encoder()
    a, b = (clip(tmp_path / f"{name}.mp4", [(colours.red, n)]) for n, name in enumerate("ab", start=1))
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([a, b], model=model)
    a.unlink()
    assert index.update(model=model).num_removed == 1
    assert index.update(model=model).num_unchanged == 1
    index.remove([str(b)])
    # removed by hand, it does not come back by itself
    assert index.update(model=model).num_added == 0
    assert index.add([b], model=model).num_added == 1


@pytest.mark.parametrize("way", ["remove", "never"])
def test_a_folder_that_is_gone_blocks_updates_only_while_files_of_it_are_known(
    world, tmp_path, clip, way
) -> None:
    folder, index, model = world
    other = tmp_path / "other"
    clip(other / "deep" / "a.mp4", [((9, 9, 200), 2)])
    if way == "remove":
        index.add([other], model=model)
        shutil.rmtree(other)
        with pytest.raises(InvalidInput, match="remove its videos with vlm index remove"):
            index.update(model=model)
        index.remove([str(other / "deep" / "a.mp4")])
    else:
        (other / "deep" / "a.mp4").unlink()
        index.add([other], model=model)
        shutil.rmtree(other)
    assert index.update(model=model).num_unchanged == 3
    # the place is looked at again once it is back
    clip(other / "b.mp4", [((9, 9, 200), 2)])
    assert index.update(model=model).num_added == 1


def test_a_rejected_file_named_outright_is_forgotten_once_it_is_gone(world, tmp_path) -> None:
    _, index, model = world
    (broken := tmp_path / "broken.mp4").write_bytes(b"no video")
    assert len(index.add([broken], model=model).rejected) == 1
    broken.unlink()
    report = index.update(model=model)
    assert (report.num_unchanged, report.num_removed) == (3, 0)
    assert index.info()["num_rejected"] == 0
    assert index.update(model=model).num_unchanged == 3


def test_a_changed_model_is_refused_with_the_command_that_embeds_again(world, make_encoder) -> None:
    folder, index, _ = world
    for other in (make_encoder(fingerprint="colours-2" * 4), make_encoder(num_frames=8)):
        with pytest.raises(InvalidInput, match=r"cannot be compared.*vlm index build PATH --out NEW"):
            index.update(model=other)


def test_one_percent_more_costs_about_one_percent(tmp_path, soak, monkeypatch) -> None:
    torch = importlib.import_module("torch")

    class Encoder(soak.Encoder):
        num_clips = 0

        def encode_video(self, video):
            self.num_clips += len(video)
            features = super().encode_video(video)
            # as many bytes a segment as a real model's: without them the catalogue's pages would be the most
            return features._replace(tokens=torch.rand(len(video), 2 * 16 * 16, 64))

    def written() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["wchar"])

    monkeypatch.setattr("vlm.retrieval.ingest.run.decode_files", soak.decode_made_up)
    model, folder = Encoder(), tmp_path / "v"
    folder.mkdir()
    for number in range(1600):
        soak.write_video(folder / f"{number}.mp4", number, 5)
    begin = written()
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([folder], model=model)
    Searcher(index, model)
    built_bytes, built_clips, model.num_clips = written() - begin, model.num_clips, 0
    for number in range(1600, 1616):
        soak.write_video(folder / f"{number}.mp4", number, 5)
    begin = written()
    assert index.add([folder], model=model).num_added == 16
    searcher = Searcher(index, model)
    assert (built_clips, model.num_clips) == (1601, 16)  # one more to see the shapes
    assert written() - begin < 0.02 * built_bytes
    assert len(searcher.search("anything", top_k=2000)) == 1616
