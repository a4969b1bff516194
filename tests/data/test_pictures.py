"""Pictures through the videos' safe path: decoded whole or refused with a reason, packed, indexed, loaded."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlm.data import Loader, LoaderConfig, ShardSource
from vlm.data.annotations import Annotation, read_annotations, read_folder
from vlm.data.decoding import DecodeLimits, read_picture
from vlm.data.foreign import index_foreign
from vlm.data.packing import pack
from vlm.data.shards.layout import read_manifest
from vlm.data.shards.reader import ShardReader
from vlm.data.sources import media_member
from vlm.errors import DataError
from vlm.types import Preprocessing


def picture(number: int = 0, width: int = 48, height: int = 32) -> Image.Image:
    """Smooth colours, which JPEG keeps, and so that a turned picture shows; ``number`` tells them apart."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 2 % 256, 40 * number + y // 2, 255 - x - y], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode", "how", "tolerance"),
    [
        ("PNG", "RGB", {}, 0), ("PNG", "RGBA", {}, 0), ("PNG", "L", {}, 0), ("PNG", "P", {}, 0),
        ("PNG", "1", {}, 0), ("WEBP", "RGB", {"lossless": True}, 0), ("WEBP", "RGB", {"quality": 95}, 8),
        ("JPEG", "RGB", {"quality": 95}, 8), ("JPEG", "RGB", {"quality": 95, "progressive": True}, 8),
        ("JPEG", "L", {"quality": 95}, 1), ("JPEG", "CMYK", {"quality": 95}, 3),
    ],
)  # fmt: skip
def test_pixels_are_those_of_another_decoder(kind: str, mode: str, how: dict, tolerance: int) -> None:
    """Lossless to the bit; lossy but for the rounding of colours."""
    data = encoded(picture().convert(mode), kind, **how)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
    found = read_picture(data).frame
    assert found.shape == (32, 48, 3) and found.dtype == np.uint8
    assert np.abs(found - expected).max() <= tolerance


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_cameras_that_were_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), "JPEG", quality=95, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), np.int16)
    assert np.abs(read_picture(data).frame - expected).max() <= 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_cut_off_is_no_picture(kind: str) -> None:
    data = encoded(picture(width=160, height=120), kind)
    assert read_picture(data).frame.shape == (120, 160, 3)
    for share in (0.1, 0.4, 0.7, 0.9):
        with pytest.raises(DataError) as caught:
            read_picture(data[: int(share * len(data))])
        assert caught.value.reason in ("damaged", "not_a_picture")


def test_what_is_refused(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    cases = {
        "not_a_picture": [
            b"text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"#EXTM3U\n/etc/passwd\n",
            b"ffconcat version 1.0\nfile a.jpg\n", clip, clip.read_bytes(), encoded(picture(), "GIF"),
            encoded(picture(), "TIFF"), encoded(picture(), "BMP"),
        ],
        "empty": [b"", tmp_path / "empty.jpg"],
        "missing": [tmp_path / "none.jpg", "http://127.0.0.1:9/a.jpg"],
        "not_a_file": [tmp_path],
    }  # fmt: skip
    for reason, sources in cases.items():
        for source in sources:
            with pytest.raises(DataError) as caught:
                read_picture(source)
            assert caught.value.reason == reason, source


@pytest.mark.parametrize(("kind", "size"), [("PNG", 12_000), ("JPEG", 12_000), ("WEBP", 8_000)])
def test_a_small_file_cannot_make_a_huge_picture(kind: str, size: int) -> None:
    data = encoded(Image.new("L", (size, size)), kind)
    assert len(data) < 2_000_000
    with pytest.raises(DataError) as caught:
        read_picture(data)
    assert caught.value.reason in ("damaged", "too_large", "not_a_picture")
    small = DecodeLimits(max_pixels=1000)
    with pytest.raises(DataError):
        read_picture(encoded(picture(), kind), small)


# --- packing


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    folder = tmp_path_factory.mktemp("album")
    for number, (suffix, kind) in enumerate(
        (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPG", "PNG"))
    ):
        (folder / f"p{number}.{suffix}").write_bytes(encoded(picture(number), kind))
        (folder / f"p{number}.txt").write_text(f"picture {number}\nagain {number}\n")
    (folder / "torn.jpg").write_bytes(encoded(picture(width=160, height=120), "JPEG")[:900])
    (folder / "torn.txt").write_text("torn\n")
    (folder / "mute.png").write_bytes(encoded(picture(), "PNG"))
    (folder / "film.jpg").write_bytes(clip.read_bytes())
    (folder / "film.txt").write_text("a film\n")
    (folder / "film.mp4").write_bytes(clip.read_bytes())
    return folder


def test_pictures_are_packed_or_rejected_with_their_reason(album: Path, tmp_path: Path) -> None:
    manifest = pack(read_folder(album, "image"), album, tmp_path / "s", media="image")
    assert {item.item: item.reason for item in manifest.rejected} == {
        "torn.jpg": "damaged", "mute.png": "no_caption", "film.jpg": "not_a_picture",
    }  # fmt: skip
    assert manifest.num_samples == 4 and manifest.duration_s == 0
    assert read_manifest(tmp_path / "s").media == "image"
    reader = ShardReader(tmp_path / "s")
    names = {}
    for number in range(4):
        raw = reader.read(0, number)
        facts = json.loads(raw.members["json"])
        names[facts["image"]] = set(raw.members) - {"json", "txt"}
        assert (facts["width"], facts["height"]) == (48, 32) and "duration_s" not in facts
        assert media_member(raw, "image") == (album / facts["image"]).read_bytes()
    assert names == {"p0.jpg": {"jpg"}, "p1.png": {"png"}, "p2.webp": {"webp"}, "p3.JPG": {"png"}}


def test_the_first_medium_does_not_take_the_other(album: Path, tmp_path: Path) -> None:
    videos = pack(read_folder(album), album, tmp_path / "v")
    assert videos.media == "video" and videos.num_samples == 1 and "media" not in videos.input
    entries = [Annotation(video="film", captions=("a film",)), Annotation(video="p1", captions=("x",))]
    manifest = pack(entries, album, tmp_path / "i", media="image")
    assert [item.reason for item in manifest.rejected] == ["not_a_picture"] and manifest.num_samples == 1
    with pytest.raises(ValueError, match="videos to encode anew"):
        from vlm.data.reencoding import Reencoding

        pack(entries, album, tmp_path / "r", media="image", reencoding=Reencoding())


def test_the_command_packs_pictures_of_the_published_layout(album: Path, tmp_path: Path, capsys) -> None:
    from vlm.cli import main

    rows = [{"image": f"p{n}.{s}", "caption": [f"one {n}", f"two {n}"]} for n, s in ((0, "jpg"), (1, "png"))]
    (tmp_path / "coco.json").write_text(json.dumps([*rows, {"image": "torn.jpg", "caption": "torn"}]))
    assert read_annotations(tmp_path / "coco.json")[0].captions == ("one 0", "two 0")
    command = ["data", "pack", "--annotations", str(tmp_path / "coco.json"), "--videos", str(album)]
    assert main([*command, "--media", "image", "--out", str(tmp_path / "s")]) == 3
    printed = capsys.readouterr().out
    assert "2 pictures, in 1 shards" in printed and "rejected 'torn.jpg': damaged" in printed
    assert main(["data", "verify", str(tmp_path / "s")]) == 0
    assert main(["data", "describe", str(tmp_path / "s")]) == 0
    assert main([*command, "--media", "image", "--reencode", "--out", str(tmp_path / "t")]) == 2
    assert "--reencode is for videos" in capsys.readouterr().err


def test_tars_of_pictures_made_by_others(album: Path, tmp_path: Path) -> None:
    """As img2dataset leaves them: jpg, json and txt of each."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        for number in range(3):
            data = encoded(picture(number), "JPEG")
            facts = json.dumps({"caption": f"number {number}", "url": "x", "status": "success"}).encode()
            members = {"jpg": data[:300] if number == 1 else data, "json": facts, "txt": b"x"}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"00000000{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    manifest = index_foreign(tmp_path / "tars", tmp_path / "s", media="image")
    assert (manifest.num_samples, manifest.media) == (2, "image")
    assert [item.reason for item in manifest.rejected] == ["damaged"]
    source = ShardSource(tmp_path / "s")
    sample = source.load(0, 1, lambda available: np.zeros(available, np.int64))
    assert sample.captions == ("number 2",) and sample.frames.shape == (1, 32, 48, 3)
    unchecked = index_foreign(tmp_path / "tars", tmp_path / "u", media="image", decode=False)
    assert unchecked.num_samples == 3
    with pytest.raises(Exception, match="no_video_member"):
        index_foreign(tmp_path / "tars", tmp_path / "v")


def test_packed_pictures_become_clips_of_one_frame(album: Path, tmp_path: Path) -> None:
    from vlm.data import Corpus

    pack(read_folder(album, "image"), album, tmp_path / "s", media="image")
    corpus = Corpus(source=ShardSource(tmp_path / "s"), name="album", media="image")
    p = Preprocessing(num_frames=4, image_size=32)
    (batch,) = Loader([corpus], p, LoaderConfig(batch_size=4)).batches(num_epochs=1)
    assert batch.video().shape == (4, 1, 3, 32, 32)
    for clip in batch.clips:
        number = int(clip.key.removeprefix("p")[0])
        assert clip.captions == (f"picture {number}", f"again {number}")
        assert abs(int(clip.pixels[0, 1, 2, 16]) - number * 40) < 12
