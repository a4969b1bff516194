"""Compaction gives back room, changes no answer, and leaves nobody with wrong ones."""

from __future__ import annotations

import os

import numpy as np
import pytest

from vlm.errors import BusyError, IntegrityError
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.upkeep import compaction
from vlm.retrieval.upkeep.compaction import compact


@pytest.fixture
def folder(movies, tmp_path, make_encoder, monkeypatch):
    """An index of three videos in three parts, two generations of them added later; one video is removed."""
    import vlm.retrieval.ingest.run as run

    monkeypatch.setattr(run, "PART_SEGMENTS", 1)
    model = make_encoder()
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([movies], model=model)
    assert len(index.snapshot.parts) == 3
    index.remove([str(movies / "rgb.mp4")])
    return index.folder


def answers(folder, model, **options):
    searcher = Searcher(VideoIndex.open(folder), model, **options)
    return [searcher.search(word, rerank=rerank) for word in ("red", "blue", "grey") for rerank in (0, 3)]


def test_drops_what_is_dead_and_nothing_else(folder, make_encoder, contents) -> None:
    model = make_encoder()
    before, expected = contents(folder), answers(folder, model)
    index = VideoIndex.open(folder)
    row_bytes = 2 * 3 + index.manifest.features.token_bytes
    done = compact(index)
    assert (done.num_dropped_rows, done.num_dropped_generations) == (5, 3)
    # what is dropped is at least the numbers of the dead rows, and the parts were joined
    assert done.bytes_before - done.bytes_after >= 5 * row_bytes
    assert len(index.snapshot.parts) == 1 and index.snapshot.alive.all()
    assert (contents(folder), answers(folder, model)) == (before, expected)
    assert answers(folder, model, backend="exact") == expected
    assert index.verify() == []
    assert {f"{kind}/{name}" for kind in ("vectors", "tokens") for name in os.listdir(folder / kind)} == {
        file.name for file in index.files()
    }
    # once is enough
    again = compact(index)
    assert (again.num_dropped_rows, again.bytes_written, again.bytes_after) == (0, 0, done.bytes_after)


def test_parts_without_dead_rows_are_not_written_again(folder, movies, make_encoder, monkeypatch) -> None:
    monkeypatch.setattr(compaction, "_SMALL_BYTES", 1)
    index = VideoIndex.open(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "vectors").iterdir()}
    dead = folder / "vectors" / "000003.npy"
    assert dead in before
    done = compact(index)
    assert done.bytes_written == 0 and done.num_dropped_rows == 5
    after = {path: path.stat().st_mtime_ns for path in (folder / "vectors").iterdir()}
    assert after == {path: time for path, time in before.items() if path != dead}
    assert index.verify() == []


def test_order_among_equal_scores_stays(tmp_path, clip, colours, make_encoder, monkeypatch) -> None:
    import vlm.retrieval.ingest.run as run

    monkeypatch.setattr(run, "PART_SEGMENTS", 2)
    monkeypatch.setattr(compaction, "_SMALL_BYTES", 1)
    model = make_encoder()
    for number in range(9):
        clip(tmp_path / "v" / f"{number}.mp4", [(colours.red, 1)])
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([tmp_path / "v"], model=model)
    index.remove([str(tmp_path / "v" / name) for name in ("2.mp4", "6.mp4", "7.mp4")])
    before = [hit.path for hit in Searcher(index, model).search("red")]
    assert [os.path.basename(path)[0] for path in before] == list("013458")
    compact(index)
    assert [hit.path for hit in Searcher(index, model).search("red")] == before


def test_a_reader_of_an_older_generation_goes_on_or_is_told(folder, movies, make_encoder) -> None:
    model = make_encoder()
    for backend in ("exact", "auto"):
        held = Searcher(VideoIndex.open(folder), model, backend=backend)
        expected = held.search("grey")
        VideoIndex.open(folder).remove([str(movies / "grey.mp4")])
        compact(VideoIndex.open(folder))
        assert held.search("grey") == expected
        for options in ({"rerank": 9}, {"where": "duration_s > 1"}):
            with pytest.raises(BusyError, match=r"was compacted since it was opened.*refresh"):
                held.search("grey", **options)
        with pytest.raises(BusyError, match="was compacted"):
            held.index.info()
        held.refresh()
        assert [os.path.basename(hit.path) for hit in held.search("grey", rerank=3)] == ["yellow.mp4"]
        VideoIndex.open(folder).add([movies / "grey.mp4"], model=model)


def test_part_numbers_are_never_used_twice(folder, movies, make_encoder) -> None:
    index, model = VideoIndex.open(folder), make_encoder()
    held = VideoIndex.open(folder)
    last = max(part for part, _, _ in held.snapshot.parts)
    index.remove([video.video_id for video in index.snapshot.videos])
    compact(index)
    assert index.files() == [] and index.info()["num_videos"] == 0
    index.add([movies / "rgb.mp4"], model=model)
    assert [part for part, _, _ in index.snapshot.parts] == [last + 1]
    # so that whoever still looks for the old part finds nothing, instead of something else
    with pytest.raises(IntegrityError):
        held.log.tokens(last, [0], quantised=True)
    assert index.verify() == []


def test_no_room_to_tidy_the_catalogue_is_no_failure(folder, contents, monkeypatch) -> None:
    from vlm.errors import NoSpaceError
    from vlm.retrieval.catalog import Catalog

    def full(_: Catalog) -> None:
        raise NoSpaceError("full")

    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "shrink", full)
        assert compact(VideoIndex.open(folder)).num_dropped_rows == 5
    index = VideoIndex.open(folder)
    assert index.verify() == [] and contents(folder) == before
    assert len(os.listdir(folder / "vectors")) == len(index.snapshot.parts)


def test_an_empty_index(tmp_path, make_encoder) -> None:
    index = VideoIndex.create(tmp_path / "i", make_encoder())
    assert compact(index).bytes_after == 0
    assert index.verify() == [] and np.array_equal(index.snapshot.alive, [])


def test_the_command_line(folder, call_vlm) -> None:
    code, output, _ = call_vlm("index", "compact", str(folder))
    assert code == 0 and output.startswith("dropped 5 segments and 3 generations;")
    code, output, _ = call_vlm("index", "compact", str(folder), "--json")
    assert code == 0 and '"num_dropped_rows": 0' in output
