"""One flipped byte anywhere in an index folder is found and its file named; what can be mended is mended."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import IntegrityError, InvalidInput
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.catalog import Catalog, Changes
from vlm.retrieval.upkeep.compaction import compact
from vlm.retrieval.upkeep.repair import repair
from vlm.retrieval.upkeep.verification import verify_folder


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory, make_encoder) -> Path:
    """An index with several generations, a removed video and a search cache; tests work on copies."""
    folder = shutil.copytree(built, tmp_path_factory.mktemp("whole") / "index")
    index = VideoIndex.open(folder)
    index.remove([next(v.video_id for v in index.snapshot.videos if v.path.endswith(b"grey.mp4"))])
    Searcher(index, make_encoder())
    assert verify_folder(folder) == []
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def names(folder: Path) -> set[str]:
    return {finding.name for finding in verify_folder(folder)}


def files_of(folder: Path) -> list[Path]:
    """Return the files that hold something; SQLite makes what its readers share anew (-shm) each time."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    return sorted(path for path in files if path.stat().st_size)


def flip(path: Path, position: int, bit: int = 1) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ bit]))


def test_every_flipped_byte_is_found_and_its_file_named(folder) -> None:
    rng = np.random.default_rng(3)
    files = files_of(folder)
    found = {str(path.relative_to(folder)) for path in files}
    expected = {
        "manifest.json", "catalog.sqlite", "catalog.seal", "vectors/000001.npy", "tokens/000001.npy",
        "tokens/000001.scale.npy",
    }  # fmt: skip
    assert expected <= found <= expected | {"ann/structure.faiss", "ann/structure.json", "ann/strength.json"}
    for path in files:
        size = path.stat().st_size
        many = 120 if path.name == "catalog.sqlite" else 25
        edges = {0, 1, size - 1, size // 2} | ({18, 19, 24, 28, 60, 92, 96} if many == 120 else set())
        for position in sorted(edges | set(rng.integers(0, size, many).tolist())):
            bit = 1 << int(rng.integers(8))
            flip(path, position, bit)
            name, found = str(path.relative_to(folder)), names(folder)
            # where the catalogue lists the hash of another file, that file seems changed, too
            assert found == {name} or (name == "catalog.sqlite" and name in found), (name, position, bit)
            flip(path, position, bit)
    assert verify_folder(folder) == []


def test_what_sqlite_shares_between_readers_holds_nothing(folder, contents) -> None:
    expected = contents(folder)
    for junk in (b"", b"\xff" * 32768, np.random.default_rng(1).bytes(32768)):
        (folder / "catalog.sqlite-shm").write_bytes(junk)
        assert verify_folder(folder) == [] and contents(folder) == expected


@pytest.mark.parametrize("change", ["cut", "longer", "missing", "empty"])
def test_files_of_another_size_are_found(folder, change) -> None:
    for path in files_of(folder):
        content = path.read_bytes()
        if change == "missing":
            path.unlink()
        else:
            path.write_bytes({"cut": content[:-1], "longer": content + b"\0", "empty": b""}[change])
        name = str(path.relative_to(folder))
        # without its label, a cache is no cache
        is_no_loss = name in ("ann/structure.json", "ann/strength.json") and change == "missing"
        assert names(folder) == (set() if is_no_loss else {name}), name
        path.write_bytes(content)
    assert verify_folder(folder) == []


@pytest.mark.parametrize("statement", [
    "UPDATE videos SET duration_s = 1 WHERE id = 1",
    "UPDATE spans SET first_row = first_row + 1",
    "DELETE FROM videos WHERE id = 2",
    "DELETE FROM generations WHERE id = 0",
    "DELETE FROM generations WHERE id = 1",
    "DELETE FROM generations WHERE id = (SELECT max(id) FROM generations)",
    "DELETE FROM manifest",
    "UPDATE generations SET parts = replace(parts, '000001', '000002')",
    "INSERT INTO removals(kind, target, generation) VALUES ('video', 1, 1)",
    "INSERT INTO removals(kind, target, generation) VALUES ('video', 1, 99)",
    "UPDATE seen SET mtime_ns = 1",
])  # fmt: skip
@pytest.mark.parametrize("is_compacted", [False, True])
def test_changed_rows_are_found(folder, statement, is_compacted) -> None:
    if is_compacted:
        compact(VideoIndex.open(folder))
    with Catalog.open(folder / "catalog.sqlite", write=True) as catalog:
        before = catalog.image()
        catalog.query(statement)
        if catalog.image() == before:
            pytest.skip("changes nothing here")
    assert "catalog.sqlite" in names(folder)


def test_flips_in_the_catalogue_never_give_wrong_hits(folder, make_encoder) -> None:
    path, model = folder / "catalog.sqlite", make_encoder()
    expected = [Searcher(VideoIndex.open(folder), model, backend="exact").search(w) for w in ("red", "blue")]
    content = path.read_bytes()
    used = [i for i in range(len(content)) if content[i]]
    for position in np.random.default_rng(5).choice(used, 60, replace=False).tolist():
        flip(path, position, 16)
        try:
            index = VideoIndex.open(folder)
            detected = bool(index.verify())
            hits = [Searcher(index, model, backend="exact").search(w) for w in ("red", "blue")]
            assert detected or hits == expected
        except IntegrityError:
            pass
        path.write_bytes(content)


def test_nothing_waits_in_the_log_of_writes_though_a_reader_is_there(folder) -> None:
    with Catalog.open(folder / "catalog.sqlite") as reader:
        reader.latest()
        index = VideoIndex.open(folder)
        index.remove([index.snapshot.videos[0].video_id])
        assert (folder / "catalog.sqlite-wal").stat().st_size == 0
    # one in the middle of a query keeps it from being emptied; then the seal tells of every loss in it
    with Catalog.open(folder / "catalog.sqlite") as reader:
        reader.hold(reader.latest())
        with Catalog.open(folder / "catalog.sqlite", write=True) as writer:
            writer.query("PRAGMA busy_timeout = 50")
            writer.commit(Changes(seen=[(b"/somewhere", 1, 1, "")]))
            writer.seal()
        log = folder / "catalog.sqlite-wal"
        content = log.read_bytes()
    assert content and verify_folder(folder) == []
    for position in range(0, len(content), len(content) // 60):
        log.write_bytes(content[:position] + bytes([content[position] ^ 2]) + content[position + 1 :])
        (folder / "catalog.sqlite-shm").unlink(missing_ok=True)
        assert {finding.name for finding in verify_folder(folder)} == {"catalog.sqlite"}, position


def test_a_catalogue_that_lost_track_of_its_parts_does_not_sweep_them(folder) -> None:
    index, parts = VideoIndex.open(folder), sorted(os.listdir(folder / "vectors"))
    with Catalog.open(folder / "catalog.sqlite", write=True) as catalog:
        catalog.query("UPDATE generations SET parts = replace(parts, '000001', '000009')")
    with pytest.raises(IntegrityError, match=r"generation 1 are not the ones.*vlm index verify"):
        index.remove([index.snapshot.videos[0].video_id])
    assert sorted(os.listdir(folder / "vectors")) == parts


def test_torn_vectors_are_an_error_not_a_wrong_hit(folder, make_encoder) -> None:
    path = next((folder / "vectors").glob("*.npy"))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(IntegrityError, match=r"vectors/000001\.npy.*vlm index verify"):
        Searcher(VideoIndex.open(folder), make_encoder(), backend="exact").search("red")


def test_a_damaged_manifest_is_an_error_that_names_the_repair(folder) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"open"', b'"0pen"'))
    with pytest.raises(IntegrityError, match=r"manifest\.json: its content changed.*--repair"):
        VideoIndex.open(folder)


class TestRepair:
    @pytest.fixture
    def hits(self, folder, make_encoder):
        return lambda: Searcher(VideoIndex.open(folder), make_encoder()).search("red", rerank=2)

    @pytest.mark.parametrize(
        "name", ["manifest.json", "catalog.seal", "ann/structure.faiss", "ann/structure.json"]
    )
    @pytest.mark.parametrize("is_gone", [False, True])
    def test_what_is_derived_is_made_again(self, folder, hits, contents, name, is_gone) -> None:
        path, expected = folder / name, (hits(), contents(folder))
        if not path.exists():
            pytest.skip("faiss is not installed")
        before = path.read_bytes()
        path.unlink()
        if not is_gone:
            path.write_bytes(before[:30] + bytes([before[30] ^ 8]) + before[31:])
        done = repair(folder)
        is_no_damage = is_gone and name == "ann/structure.json"
        assert [finding.name for finding in done.findings] == ([] if is_no_damage else [name])
        assert (done.lost, done.command) == ((), None)
        assert verify_folder(folder) == []
        assert is_no_damage or path.read_bytes() == before
        assert (hits(), contents(folder)) == expected

    def test_flips_in_the_catalogue_are_mended_or_refused(self, folder, contents) -> None:
        path, expected = folder / "catalog.sqlite", contents(folder)
        seal, content = (folder / "catalog.seal").read_bytes(), path.read_bytes()
        outcomes = {"mended": 0, "refused": 0}
        for position in np.random.default_rng(7).integers(100, len(content), 40).tolist():
            flip(path, position, 32)
            try:
                repair(folder)
                assert verify_folder(folder) == [] and contents(folder) == expected
                outcomes["mended"] += 1
            except IntegrityError as error:
                assert "cannot be repaired" in str(error) and "vlm index build PATH" in str(error)
                outcomes["refused"] += 1
            for leftover in folder.glob("catalog.*"):
                leftover.unlink()
            path.write_bytes(content)
            (folder / "catalog.seal").write_bytes(seal)
        # most of a small catalogue's pages hold nothing
        assert outcomes["mended"] > 10 and outcomes["refused"] > 0

    @pytest.mark.parametrize("name", ["vectors/000001.npy", "tokens/000001.npy", "tokens/000001.scale.npy"])
    def test_lost_vectors_are_named_and_embedded_again(
        self, movies, tmp_path, make_encoder, contents, name, monkeypatch
    ) -> None:
        import vlm.retrieval.ingest.run as run

        monkeypatch.setattr(run, "PART_SEGMENTS", 1)
        folder, model = tmp_path / "i", make_encoder()
        VideoIndex.create(folder, model).add([movies], model=model)
        expected = contents(folder)
        flip(folder / name, (folder / name).stat().st_size - 1)
        done = repair(folder)
        assert [finding.name for finding in done.findings] == [name]
        assert [os.path.basename(path) for path in done.lost] == ["yellow.mp4"]
        assert done.command == f"vlm index update {folder}"
        assert verify_folder(folder) == []
        left = contents(folder)
        assert len(left) == 2 and left.items() <= expected.items()
        info = VideoIndex.open(folder).info()
        assert [(os.path.basename(r["path"]), r["reason"]) for r in info["rejected"]] == [
            ("yellow.mp4", "damaged")
        ]
        assert Searcher(VideoIndex.open(folder), model).search("yellow")
        model.num_clips = 0
        report = VideoIndex.open(folder).update(model=model)
        assert (report.num_added, report.num_unchanged, model.num_clips) == (1, 2, 3)
        assert contents(folder) == expected
        assert VideoIndex.open(folder).info()["num_rejected"] == 0

    def test_nothing_is_wrong(self, folder) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert repair(folder).findings == ()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_damage_is_not_copied(self, folder) -> None:
        flip(folder / "vectors" / "000001.npy", 140)
        before = sorted(os.listdir(folder / "vectors"))
        with pytest.raises(IntegrityError, match=r"vectors/000001\.npy: its content changed.*--repair"):
            compact(VideoIndex.open(folder))
        assert sorted(os.listdir(folder / "vectors")) == before


def test_no_index_there(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="no index there"):
        verify_folder(tmp_path)


def test_the_command_line_names_what_is_damaged_and_what_embeds_again(folder, call_vlm) -> None:
    flip(folder / "tokens" / "000001.npy", 150)
    code, _, errors = call_vlm("index", "verify", str(folder))
    assert code == 5 and "tokens/000001.npy: its content changed" in errors and "--repair" in errors
    code, output, _ = call_vlm("index", "verify", str(folder), "--repair", "--json")
    values = json.loads(output)
    assert code == 3 and values["command"] == f"vlm index update {folder}" and len(values["lost"]) == 2
    assert call_vlm("index", "verify", str(folder))[0] == 0
