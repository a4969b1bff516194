"""Byte ranges: every answer compared with the slice of the file that Python takes."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.serving.transport.ranges import ByteRange, parse_range


def naive(first: int | None, last: int | None, size: int) -> bytes | None:
    """Return which of the bytes 0, 1, 2, … a range means, by slicing a list; None if none."""
    content = list(range(size))
    if first is None:
        part = content[-last:] if last else []
    else:
        part = content[first:] if last is None else content[first : last + 1]
    return part or None


@given(
    size=st.integers(1, 50),
    first=st.none() | st.integers(0, 60),
    last=st.none() | st.integers(0, 60),
)
def test_a_range_is_the_slice_it_names(size, first, last) -> None:
    if first is None and last is None or (first is not None and last is not None and last < first):
        header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
        assert parse_range(header, size) is None
        return
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    expected = naive(first, last, size)
    if expected is None:
        with pytest.raises(LookupError):
            parse_range(header, size)
    else:
        assert parse_range(header, size) == ByteRange(expected[0], expected[-1])


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=0-1,3-4",
        "items=0-4",
        "bytes=--1",
        "bytes=1-0",
        "bytes=0x0-0x4",
        "bytes=-1-2",
        "bytes=\u0661-\u0662",
        "bytes=0-" + "9" * 30,
        "bytes=" + "0-0," * 10_000,
    ],
)
def test_what_is_no_single_range_means_the_whole_file(header) -> None:
    assert parse_range(header, 10) is None


def test_streams_are_the_files_bytes(site, films, ids) -> None:
    content = (films / "red then green.mp4").read_bytes()
    address, size = f"/api/videos/{ids['red']}/content", len(content)
    whole = site.get(address)
    assert (whole.status, whole.body) == (200, content)
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["accept-ranges"] == "bytes"
    for header, first, last in [
        ("bytes=0-0", 0, 0),
        ("bytes=5-", 5, size - 1),
        ("bytes=-7", size - 7, size - 1),
        (f"bytes={size - 1}-", size - 1, size - 1),
        ("bytes=10-999999999999", 10, size - 1),
        (f"bytes=-{size * 3}", 0, size - 1),
        ("bytes=100-1999", 100, 1999),
    ]:
        part = site.get(address, Range=header)
        assert (part.status, part.body) == (206, content[first : last + 1]), header
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert part.headers["content-length"] == str(last - first + 1)
    for header in (f"bytes={size}-", "bytes=-0", "bytes=99999999999-"):
        beyond = site.get(address, Range=header)
        assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{size}"), header
        assert beyond.body == b""
    assert site.get(address, Range="bytes=0-1,4-5").status == 200


def test_head_says_what_get_would_and_sends_nothing(site, ids) -> None:
    address = f"/api/videos/{ids['blue']}/content"
    get, head = site.get(address), site.ask("HEAD", address)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(get.body))
    part = site.ask("HEAD", address, headers={"Range": "bytes=2-5"})
    assert (part.status, part.headers["content-length"]) == (206, "4")


def test_an_unchanged_file_is_not_sent_again(site, ids) -> None:
    address = f"/api/videos/{ids['blue']}/content"
    tag = site.get(address).headers["etag"]
    assert site.get(address, If_None_Match=tag).status == 304
    assert site.get(address, If_None_Match='"other"').status == 200
    assert site.get(address, If_Range=tag, Range="bytes=0-3").status == 206
    assert site.get(address, If_Range='"other"', Range="bytes=0-3").status == 200


def test_thousands_of_ranges_get_the_whole_file_and_cost_nothing(site, ids) -> None:
    header = "bytes=" + ",".join(f"{n}-{n}" for n in range(3000))
    started = time.monotonic()
    reply = site.get(f"/api/videos/{ids['blue']}/content", Range=header)
    assert reply.status == 200 and time.monotonic() - started < 1
    assert reply.body == site.get(f"/api/videos/{ids['blue']}/content").body


def test_descriptors_do_not_pile_up(site, ids) -> None:
    address = f"/api/videos/{ids['blue']}/content"
    site.get(address)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        site.get(address, Range="bytes=0-3")
        site.get(address, Range="bytes=99999999-")
        site.ask("HEAD", address)
    time.sleep(0.2)
    assert len(os.listdir("/proc/self/fd")) <= before + 3
