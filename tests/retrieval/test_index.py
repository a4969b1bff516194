from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from vlm.errors import BusyError, CapabilityError, InvalidInput
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.catalog import Catalog
from vlm.retrieval.durability import WriterLock

STRANGE_NAMES = [
    "it's \"quoted\".mp4", "line\nbreak.mp4", "-leading-dash.mp4", "[brackets] {x} *.mp4", "čaj 日本 🎬.mp4",
    "semi;colon --out x.mp4", "http:__x%20y.mp4", "file:colon.mp4", " space .mp4", "UPPER.MP4",
]  # fmt: skip


@pytest.fixture
def index(built, tmp_path) -> VideoIndex:
    """A copy of the built index that a test may change."""
    return VideoIndex.open(shutil.copytree(built, tmp_path / "copy"))


def names(index: VideoIndex) -> list[str]:
    return sorted(os.path.basename(os.fsdecode(video.path)) for video in index.snapshot.videos)


def test_what_is_recorded(built, movies, make_encoder) -> None:
    index = VideoIndex.open(built)
    info = json.loads(json.dumps(index.info()))
    assert (info["num_videos"], info["num_segments"], info["num_rejected"], info["rejected"]) == (3, 9, 0, [])
    assert (info["model"], info["model_domain"], info["store_tokens"]) == ("colours", "open", "pooled")
    by_name = {os.path.basename(os.fsdecode(video.path)): video for video in index.snapshot.videos}
    video = by_name["rgb.mp4"]
    assert os.fsdecode(video.path) == str(movies / "rgb.mp4")
    assert (video.width, video.height, video.codec, video.num_segments) == (32, 32, "h264", 5)
    assert video.duration_s == pytest.approx(24)
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["model"]["fingerprint"] == make_encoder().fingerprint
    assert index.verify() == []


def test_unchanged_files_are_not_embedded_again(index, movies, make_encoder) -> None:
    model = make_encoder()
    before = index.snapshot.generation
    report = index.add([movies, movies / "rgb.mp4"], model=model)
    assert (report.num_added, report.num_unchanged, model.num_clips) == (0, 3, 0)
    assert index.snapshot.generation.num_segments == before.num_segments


def test_touched_changed_new_and_gone_files(tmp_path, clip, colours, make_encoder) -> None:
    model, folder = make_encoder(), tmp_path / "v"
    for name in ("touched", "changed", "gone", "broken_later"):
        clip(folder / f"{name}.mp4", [(colours.red, 2)])
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([folder], model=model)
    ids = {os.path.basename(os.fsdecode(v.path)): v.video_id for v in index.snapshot.videos}
    held = index.snapshot
    os.utime(folder / "touched.mp4", ns=(1, 1))
    clip(folder / "changed.mp4", [(colours.blue, 3)])
    (folder / "gone.mp4").unlink()
    (folder / "broken_later.mp4").write_bytes(b"no longer a video")
    clip(folder / "new.mp4", [(colours.green, 2)])
    model.num_clips = 0
    report = VideoIndex.open(tmp_path / "i").update(model=model)
    assert (report.num_added, report.num_updated, report.num_unchanged, report.num_removed) == (1, 1, 1, 1)
    assert [os.path.basename(os.fsdecode(item.path)) for item in report.rejected] == ["broken_later.mp4"]
    assert model.num_clips == 2
    # the reader that was there before still sees its own generation
    assert index.snapshot is held and len(held.videos) == 4
    assert [hit.path for hit in Searcher(index, model).search("blue")][0]
    index.refresh()
    assert names(index) == ["changed.mp4", "new.mp4", "touched.mp4"]
    assert ids["changed.mp4"] in {video.video_id for video in index.snapshot.videos}
    hits = Searcher(index, model).search("blue")
    assert hits[0].path.endswith("changed.mp4") and hits[0].end_s == pytest.approx(3)
    assert index.info()["num_rejected"] == 1
    model.num_clips = 0
    assert index.update(model=model).num_unchanged == 3
    assert model.num_clips == 0
    assert index.verify() == []


def test_an_unmounted_folder_does_not_empty_the_index(tmp_path, clip, colours, make_encoder) -> None:
    model = make_encoder()
    clip(tmp_path / "disk" / "a.mp4", [(colours.red, 1)])
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([tmp_path / "disk"], model=model)
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match="gone as a whole"):
        index.update(model=model)
    assert names(index) == ["a.mp4"]


def test_removal_by_identifier_and_path(index, movies, make_encoder) -> None:
    identifier = next(v.video_id for v in index.snapshot.videos if v.path.endswith(b"grey.mp4"))
    assert index.remove([identifier, str(movies / "rgb.mp4")]).num_removed == 2
    assert names(index) == ["yellow.mp4"]
    for backend in ("exact", "auto"):
        hits = Searcher(index, make_encoder(), backend=backend).search("red", rerank=9)
        assert [os.path.basename(hit.path) for hit in hits] == ["yellow.mp4"]
    with pytest.raises(InvalidInput, match=r"holds no video 'rgb'"):
        index.remove(["rgb"])
    assert index.verify() == []
    assert index.add([movies], model=make_encoder()).num_added == 2
    assert names(index) == ["grey.mp4", "rgb.mp4", "yellow.mp4"]
    assert index.info()["num_segments"] == 9


def test_strange_names(tmp_path, clip, colours, make_encoder) -> None:
    model, folder = make_encoder(), tmp_path / "na'me [s]"
    for name in STRANGE_NAMES:
        clip(folder / name, [(colours.red, 1)])
    shutil.copy(folder / "UPPER.MP4", os.fsencode(folder) + b"/not-utf8-\xff\xfe.mp4")
    index = VideoIndex.create(tmp_path / "in'dex \n?#%41", model)
    report = index.add([folder], model=model)
    assert (report.num_added, report.rejected) == (len(STRANGE_NAMES) + 1, ())
    assert set(STRANGE_NAMES) < set(names(index))
    hits = Searcher(VideoIndex.open(index.folder), model).search("red", top_k=50)
    assert len(hits) == len(STRANGE_NAMES) + 1
    assert all(os.path.exists(hit.path) for hit in hits)
    found = Searcher(index, model).search("red", where="path like '%line\nbreak%'")
    assert [os.path.basename(hit.path) for hit in found] == ["line\nbreak.mp4"]
    assert index.verify() == []


def test_every_bad_file_is_rejected_with_a_reason(tmp_path, clip, colours, make_encoder) -> None:
    folder, model = tmp_path / "v", make_encoder()
    good = clip(folder / "good.mp4", [(colours.red, 1)])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (folder / "list.ts").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{good}\n#EXT-X-ENDLIST\n"
    )
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:300])
    (folder / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "notes.txt").write_text("not a video")
    (folder / ".hidden.mp4").write_text("not looked at")
    clip(folder / "thin.mp4", [(colours.red, 1)], size=(2, 512))
    index = VideoIndex.create(tmp_path / "i", model)
    report = index.add([folder], model=model)
    assert names(index) == ["good.mp4"]
    reasons = {os.path.basename(os.fsdecode(item.path)): item.reason for item in report.rejected}
    assert reasons == {
        "empty.mp4": "empty", "text.mp4": "not_a_video", "list.ts": "not_a_video", "cut.mp4": "not_a_video",
        "dangling.mp4": "missing", "pipe.mp4": "not_a_file", "thin.mp4": "too_large",
    }  # fmt: skip
    assert report.other_files == {".txt": 1, ".mp4": 1}
    info = index.info()
    assert {(entry["path"], entry["reason"]) for entry in info["rejected"]} == {
        (str(folder / name), reason) for name, reason in reasons.items()
    }
    # a file that is mended is tried again and leaves the list
    shutil.copy(good, folder / "empty.mp4")
    again = index.add([folder], model=model)
    assert (again.num_added, len(again.rejected)) == (1, 6)
    assert index.info()["num_rejected"] == 6
    assert index.verify() == []


def test_numbers_that_are_not_finite_are_kept_out(tmp_path, clip, colours, make_encoder) -> None:
    model = make_encoder()
    clip(tmp_path / "v" / "a.mp4", [(colours.red, 1)])
    clip(tmp_path / "v" / "b.mp4", [(colours.blue, 1)])
    clip(tmp_path / "v" / "c.mp4", [(colours.red, 1)])
    encode = model.encode_video

    def poisoned(video):
        features = encode(video)
        features.embedding[video[:, :, 2].mean(dim=(1, 2, 3)) > 0.5] = np.nan
        return features

    index = VideoIndex.create(tmp_path / "i", model)
    model.encode_video = poisoned
    report = index.add([tmp_path / "v"], model=model)
    assert [item.reason for item in report.rejected] == ["not_finite"]
    assert names(index) == ["a.mp4", "c.mp4"]
    assert index.verify() == []
    assert len(Searcher(index, model).search("red")) == 2


def test_long_videos_span_parts(tmp_path, movies, make_encoder, contents, monkeypatch) -> None:
    import vlm.retrieval.ingest.run as run

    model = make_encoder()
    whole = VideoIndex.create(tmp_path / "whole", model, segment_s=2, stride_s=1)
    whole.add([movies], model=model, batch_size=3)
    monkeypatch.setattr(run, "PART_SEGMENTS", 2)
    monkeypatch.setattr(run, "_LONGEST_PART", 4)
    split = VideoIndex.create(tmp_path / "split", model, segment_s=2, stride_s=1)
    split.add([movies], model=model, batch_size=3)
    assert len(split.snapshot.parts) > 5
    assert contents(tmp_path / "split") == contents(tmp_path / "whole")
    a, b = (Searcher(index, model).search("blue", rerank=5) for index in (whole, split))
    assert a == b


class TestModels:
    def test_another_model_is_refused(self, built, make_encoder) -> None:
        index = VideoIndex.open(built)
        other = make_encoder(name="other", fingerprint="other-2" * 4)
        for use in (lambda: Searcher(index, other), lambda: index.add([built], model=other)):
            with pytest.raises(InvalidInput, match=r"'colours' \(colours-1col\).*'other' \(other-2other"):
                use()
        with pytest.raises(InvalidInput, match="cannot be compared"):
            Searcher(index, make_encoder(num_frames=8))

    def test_a_narrow_model_stops_at_the_first_ordinary_video(
        self, tmp_path, clip, colours, make_encoder
    ) -> None:
        model = make_encoder(name="demo", domain="digit-world")
        clip(tmp_path / "w" / "1.mp4", [(colours.red, 1)], tags={"comment": "digit-world v1"})
        clip(tmp_path / "o" / "2.mp4", [(colours.red, 1)], tags={"comment": "my holiday"})
        index = VideoIndex.create(tmp_path / "i", model)
        assert index.add([tmp_path / "w"], model=model).num_added == 1
        with pytest.raises(InvalidInput, match=r"2\.mp4 is an ordinary video.*'demo'.*--allow-demo-model"):
            index.add([tmp_path / "o"], model=model)
        assert names(index) == ["1.mp4"]
        index.add([tmp_path / "o"], model=model, allow_narrow_model=True)
        hits = {os.path.basename(hit.path): hit.warning for hit in Searcher(index, model).search("red")}
        assert hits == {"1.mp4": None, "2.mp4": "demo knows only the digit-world: this hit is random"}

    def test_a_model_without_search_is_refused(self, tmp_path, make_encoder) -> None:
        with pytest.raises(CapabilityError, match="cannot search"):
            VideoIndex.create(tmp_path / "i", make_encoder(capabilities=["classify"]))
        assert not (tmp_path / "i").exists()


class TestWriters:
    def test_one_at_a_time(self, index, movies, make_encoder) -> None:
        with WriterLock(index.folder):
            for write in (
                lambda: index.add([movies], model=make_encoder()),
                lambda: index.remove([index.snapshot.videos[0].video_id]),
            ):
                with pytest.raises(BusyError, match=rf"process {os.getpid()} on {socket.gethostname()}"):
                    write()
            assert len(Searcher(VideoIndex.open(index.folder), make_encoder()).search("red")) == 3
        index.remove([index.snapshot.videos[0].video_id])

    def test_a_writer_in_another_process(self, index) -> None:
        code = (
            "import sys, pathlib; from vlm.retrieval.durability import WriterLock\n"
            "with WriterLock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, str(index.folder)]
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(BusyError, match=f"process {other.pid}"):
                index.remove([])
            other.kill()
            other.wait()
            # killed: its note is still there, and holds nobody up
            assert json.loads((index.folder / "writer.lock").read_text())["pid"] == other.pid
            index.remove([])
            assert (index.folder / "writer.lock").read_text() == ""
        finally:
            other.kill()
            other.wait()
            other.stdin.close()
            other.stdout.close()

    def test_a_note_from_another_machine_is_respected(self, index) -> None:
        (index.folder / "writer.lock").write_text('{"pid": 1, "host": "elsewhere"}')
        with pytest.raises(BusyError, match=r"on elsewhere; .*no longer writes, delete .*writer\.lock"):
            index.remove([])

    @pytest.mark.parametrize("note", ["", "garbage", "[]", '{"pid": 999999999, "host": "HOST"}'])
    def test_a_stale_note_is_taken_over(self, index, note) -> None:
        (index.folder / "writer.lock").write_text(note.replace("HOST", socket.gethostname()))
        assert index.remove([]).num_removed == 0


class TestPlaces:
    @pytest.mark.parametrize("make", [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_text("a file"),
    ])  # fmt: skip
    def test_no_index_there(self, tmp_path, make) -> None:
        make(tmp_path / "x")
        with pytest.raises(InvalidInput, match="no index there"):
            VideoIndex.open(tmp_path / "x")

    def test_a_folder_with_other_things_is_left_alone(self, tmp_path, make_encoder) -> None:
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(InvalidInput, match="exists and is no index"):
            VideoIndex.create(tmp_path, make_encoder())
        assert os.listdir(tmp_path) == ["thesis.tex"]

    def test_another_format(self, index) -> None:
        import hashlib

        path = index.folder / "manifest.json"
        path.write_bytes(path.read_bytes().replace(b"vlm-index/3", b"vlm-index/9"))
        with Catalog.open(index.folder / "catalog.sqlite", write=True) as catalog:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            catalog.query("UPDATE generations SET digest = ? WHERE id = 0", (digest,))
        with pytest.raises(InvalidInput, match="expected format vlm-index/3, got 'vlm-index/9'"):
            VideoIndex.open(index.folder)

    def test_reading_needs_no_right_to_write(self, index, make_encoder) -> None:
        if os.geteuid() == 0:
            # root may write anywhere; a folder that nobody can add to stands for a read-only disk
            pytest.skip("runs as root")
        index.folder.chmod(0o555)
        try:
            assert len(Searcher(VideoIndex.open(index.folder), make_encoder()).search("red")) == 3
        finally:
            index.folder.chmod(0o755)

    def test_impossible_segments(self, tmp_path, make_encoder) -> None:
        with pytest.raises(InvalidInput, match="0 < stride <= segment length"):
            VideoIndex.create(tmp_path / "i", make_encoder(), segment_s=4, stride_s=8)

    def test_the_index_is_not_searched_for_videos(self, tmp_path, clip, colours, make_encoder) -> None:
        clip(tmp_path / "v" / "a.mp4", [(colours.red, 1)])
        index = VideoIndex.create(tmp_path / "v" / "index", make_encoder())
        (index.folder / "stray.mp4").write_text("x")
        assert index.add([tmp_path / "v"], model=make_encoder()).rejected == ()
