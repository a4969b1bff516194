"""Overlap: each way of looking finds its own kind of copy, and says which."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from vlm.cli import main
from vlm.data.annotations import Annotation, read_folder
from vlm.data.curation.overlap import (
    Match,
    describe_items,
    find_overlap,
    hash_set,
    open_items,
    summarise,
    video_id,
)
from vlm.data.decoding import open_video
from vlm.data.packing import pack
from vlm.data.reencoding import Reencoding, reencode
from vlm.errors import InvalidInput


def drifting(seed: int) -> list[np.ndarray]:
    wide = np.kron(np.random.default_rng(seed).integers(0, 256, (12, 40)), np.ones((16, 16)))
    return [np.repeat(wide[:128, 4 * n : 4 * n + 160, None], 3, axis=2).astype(np.uint8) for n in range(20)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, encode) -> tuple[Path, Path]:
    """A training and a test folder: one equal file, one encoded anew, one of equal name, three of no kin."""
    root = tmp_path_factory.mktemp("sets")
    train, test = root / "train", root / "test"
    (train / "part").mkdir(parents=True)
    test.mkdir()
    for seed in range(3):
        encode(train / "part" / f"t{seed}.mp4", drifting(seed), preset="ultrafast")
    encode(train / "v_j2Dhf-xFUxU.mp4", drifting(10), preset="ultrafast")
    (test / "same file.mp4").write_bytes((train / "part" / "t0.mp4").read_bytes())
    smaller = reencode(open_video(train / "part" / "t1.mp4"), Reencoding(short_side=64, quality=33))
    (test / "smaller.mp4").write_bytes(smaller)
    encode(test / "j2Dhf-xFUxU_13_20.avi", drifting(11), codec="mpeg4", b="2M")
    encode(test / "other.mp4", drifting(12), preset="ultrafast")
    (test / "broken.mp4").write_bytes(b"nothing")
    return train, test


EXPECTED = {
    ("sha256", "part/t0.mp4", "same file.mp4"), ("picture", "part/t0.mp4", "same file.mp4"),
    ("picture", "part/t1.mp4", "smaller.mp4"), ("id", "v_j2Dhf-xFUxU.mp4", "j2Dhf-xFUxU_13_20.avi"),
}  # fmt: skip


def found(matches: list[Match]) -> set[tuple[str, str, str]]:
    return {(match.by, match.first, match.second) for match in matches}


def test_folders(sets: tuple[Path, Path]) -> None:
    first, second = (describe_items(open_items(folder)) for folder in sets)
    matches = find_overlap(first, second)
    assert found(matches) == EXPECTED
    report = summarise(first, second, matches, ("a", "b"))
    assert report["num_second_in_first"] == 3
    assert report["by"] == {"id": 1, "sha256": 1, "picture": 2}
    assert report["unreadable"] == {"first": {}, "second": {"broken.mp4": "not_a_video"}}
    assert (report["first_sha256"], report["second_sha256"], report["captions"]) == ("a", "b", None)
    assert sorted(report["second_videos"]) == sorted(path.name for path in sets[1].iterdir())
    assert found(find_overlap(first, second, max_distance=0.0)) == EXPECTED - {
        ("picture", "part/t1.mp4", "smaller.mp4")
    }


def test_shards_remember_the_hash_of_what_they_were_made_from(
    tmp_path: Path, sets: tuple[Path, Path]
) -> None:
    """Encoded anew in packing, a file is still known by its own hash."""
    entries = [Annotation(video=entry.video, captions=("x",)) for entry in read_folder(sets[0])]
    pack(entries, sets[0], tmp_path / "shards", reencoding=Reencoding(short_side=64))
    first = describe_items(open_items(tmp_path / "shards"))
    second = describe_items(open_items(sets[1]))
    assert found(find_overlap(first, second)) == EXPECTED
    damaged = tmp_path / "shards" / "shard-000000.tar"
    data = bytearray(damaged.read_bytes())
    data[2000] ^= 1
    damaged.write_bytes(bytes(data))
    assert list(describe_items(open_items(tmp_path / "shards")).unreadable.values()) == ["missing"]


def test_equal_captions_are_counted_and_make_no_videos_equal(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    rows = {"train": [("part/t2.mp4", ["A dog!", "a dog", "A cat."]), ("v_j2Dhf-xFUxU.mp4", ["rain"])],
            "test": [("other.mp4", ["a dog", "no kin", "A  CAT"])]}  # fmt: skip
    for name, listed in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([{"video": v, "caption": c} for v, c in listed]))
    files = [tmp_path / "train.json", tmp_path / "test.json"]
    first, second = (describe_items(open_items(f, v)) for f, v in zip(files, sets, strict=True))
    matches = find_overlap(first, second)
    report = summarise(first, second, matches, (hash_set(files[0], first), hash_set(files[1], second)))
    assert report["captions"] == {"num_first": 3, "num_second": 3, "shared": ["a cat", "a dog"]}
    assert (report["num_second_in_first"], matches) == (0, [])
    assert report["first_sha256"] == hashlib.sha256(files[0].read_bytes()).hexdigest()


def test_a_set_is_known_by_its_manifest(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    """Shards by their manifest; a folder of videos by names and contents, in whatever order it is read."""
    entries = [Annotation(video=entry.video, captions=("x",)) for entry in read_folder(sets[0])]
    pack(entries, sets[0], tmp_path / "shards")
    of_shards = hash_set(tmp_path / "shards", describe_items(open_items(tmp_path / "shards"), pictures=False))
    assert of_shards == hashlib.sha256((tmp_path / "shards" / "manifest.json").read_bytes()).hexdigest()
    traits = describe_items(open_items(sets[0]), pictures=False)
    before = hash_set(sets[0], traits)
    traits.names.reverse()
    assert hash_set(sets[0], traits) != before
    traits.hashes.reverse()
    assert hash_set(sets[0], traits) == before


def test_embeddings(sets: tuple[Path, Path]) -> None:
    """Brightness stands for a model: the copies agree, and so does whatever it cannot tell apart."""

    def embed(source) -> np.ndarray:
        video = open_video(source)
        return np.array([video.read([0]).mean() - 100, 10.0], np.float32)

    first, second = (describe_items(open_items(folder), pictures=False, embed=embed) for folder in sets)
    matches = find_overlap(first, second, min_similarity=0.999)
    pairs = {pair[1:] for pair in found(matches) if pair[0] == "embedding"}
    assert {("part/t0.mp4", "same file.mp4"), ("part/t1.mp4", "smaller.mp4")} <= pairs
    a, b = (np.stack([e for e in t.embeddings if e is not None]) for t in (first, second))
    cosines = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]
    assert len(pairs) == (cosines >= 0.999).sum()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b/v_--0edUL8zmA.mp4", "--0edUL8zmA"), ("-_hbPLsZvvo_172_179.avi", "-_hbPLsZvvo"),
        ("G0mjFqytJt4_000152_000162", "G0mjFqytJt4"), ("video9770.mp4", "video9770"),
        ("video9770", "video9770"),
        ("26292851@N04_4253489686_265c3c8051.m4v", "26292851@N04_4253489686_265c3c8051"),
        ("1004_Juno_00.01.02.345-00.01.04.567", "1004_Juno_00.01.02.345-00.01.04.567"),
        ("clip_elevenchars", "clip_elevenchars"), ("msvd_j2Dhf-xFUxU_13_20.avi", "j2Dhf-xFUxU"),
    ],
)  # fmt: skip
def test_ids_by_hand(name: str, expected: str) -> None:
    assert video_id(name) == expected


def test_as_a_user_runs_it(tmp_path: Path, sets: tuple[Path, Path], capsys) -> None:
    train, test = map(str, sets)
    listed = tmp_path / "test.json"
    listed.write_text(
        json.dumps([{"video": "same file.mp4", "caption": "x"}, {"video": "g", "caption": "y"}])
    )
    line = ["data", "overlap", train, str(listed), "--second-videos", test]
    assert main([*line, "--json"]) == 5
    report = json.loads(capsys.readouterr().out)
    assert report["num_second"] == 2
    assert report["by"] == {"id": 0, "sha256": 1, "picture": 1}
    out = tmp_path / "new" / "overlap.json"
    out.parent.mkdir()
    assert main([*line, "--no-pictures", "--out", str(out)]) == 5
    assert json.loads(out.read_text())["by"] == {"id": 0, "sha256": 1}  # only what was looked for
    assert "sha256: 'same file.mp4' is 'part/t0.mp4' (1)" in capsys.readouterr().out
    assert main(["data", "overlap", train, str(listed)]) == 4
    assert "needs the folder of its videos" in capsys.readouterr().err
    assert main(["data", "overlap", train, str(tmp_path / "none")]) == 4
    assert "none: no such file or folder" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["data", "overlap", train, str(tmp_path / "none")]) == 4
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "o.mp4").write_bytes((sets[1] / "other.mp4").read_bytes())
    assert main(["data", "overlap", train, str(tmp_path / "clean")]) == 0
    assert "0 of 1 videos" in capsys.readouterr().out


def test_with_a_model(sets: tuple[Path, Path], capsys) -> None:
    line = ["data", "overlap", *map(str, sets), "--model", "demo", "--min-similarity", "0.9999", "--json"]
    assert main(line) == 5
    matches = json.loads(capsys.readouterr().out)["matches"]
    assert ("part/t0.mp4", "same file.mp4") in {
        (match["first"], match["second"]) for match in matches if match["by"] == "embedding"
    }


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="at least one video"):
        describe_items(open_items(tmp_path))
