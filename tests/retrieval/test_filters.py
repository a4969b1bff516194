from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.errors import InvalidInput
from vlm.retrieval.filters import COLUMNS, parse_filter

ROWS = [
    ("a", b"/v/holiday beach.mp4", 10, 61.5, 640, 480, "h264", 15),
    ("b", b"/v/it's.mp4", 20, 60.0, 320, 240, "vp9", 14),
    ("c", b"/v/100%.mkv", 30, 5.0, 1920, 1080, "hevc", 1),
    ("d", '/v/čaj "x".mkv'.encode(), 10**12, 3600.0, 8, 8, "av1", 900),
]


def select(text: str) -> str:
    condition = parse_filter(text)
    database = sqlite3.connect(":memory:")
    database.execute(
        "CREATE TABLE videos(video_id TEXT, path BLOB, size_bytes INT, duration_s REAL, width INT, "
        "height INT, codec TEXT, num_segments INT)"
    )
    database.executemany("INSERT INTO videos VALUES (?,?,?,?,?,?,?,?)", ROWS)
    found = database.execute(
        f"SELECT video_id FROM videos WHERE {condition.sql} ORDER BY 1", condition.values
    ).fetchall()
    (count,) = database.execute("SELECT count(*) FROM videos").fetchone()
    assert count == len(ROWS)
    database.close()
    return "".join(row[0] for row in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("duration_s > 60", "ad"),
        ("duration_s >= 60 and width < 640", "bd"),
        ("path like '%holiday%'", "a"),
        ("PATH LIKE '%HOLIDAY%' OR codec = 'vp9'", "ab"),
        ("path not like '/v/%.mp4'", "cd"),
        ("path = '/v/it''s.mp4'", "b"),
        ('path = "/v/čaj ""x"".mkv"', "d"),
        ("not (codec in ('h264', 'vp9'))", "cd"),
        ("codec not in ('h264', 'vp9', 'hevc')", "d"),
        ("codec == 'h264' or codec = 'vp9' and duration_s != 60", "a"),
        ("(codec == 'h264' or codec = 'vp9') and duration_s <> 60", "a"),
        ("size_bytes > 1e11", "d"),
        ("size_bytes > -5 and num_segments <= 1", "c"),
        ("size_bytes < 99999999999999999999999999", "abcd"),
    ],
)
def test_what_it_selects(text: str, expected: str) -> None:
    assert select(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "duration_s", "duration_s >", "> 3", "duration_s > 60 and", "duration_s > (3", "foo = 1",
        "1 = 1", "duration_s > 60; DROP TABLE videos", "duration_s > 60 -- x", "path like '%' UNION SELECT 1",
        "path = 'a' OR 1=1", "path = (SELECT path FROM videos)", "sha256 = 'x'", "generation = 1",
        "rowid = 1",
        "path like 'unclosed", "duration_s > width", "codec in ()", "duration_s not > 3", "path = \x00",
        "(" * 30 + "width = 1" + ")" * 30, "not " * 30 + "width = 1", "width = 1 or " * 400 + "width = 1",
        "path like '\udce9'", "duration_s > 60)", "codec = 'a' 'b'", "length(path) > 3",
    ],
)  # fmt: skip
def test_what_it_refuses(text: str) -> None:
    with pytest.raises(InvalidInput, match="filter"):
        parse_filter(text)


@given(st.text(alphabet="abw'\"()=<>%;-, 1.\n\\", max_size=60) | st.text(max_size=40))
def test_text_never_reaches_the_statement(text: str) -> None:
    try:
        condition = parse_filter(text)
    except InvalidInput:
        return
    known = {*COLUMNS.values(), "AND", "OR", "NOT", "LIKE", "IN", "(", ")", "?", ",", "<", ">", "=", " "}
    rest = condition.sql
    for word in sorted(known, key=len, reverse=True):
        rest = rest.replace(word, "")
    assert rest == ""
    assert condition.sql.count("?") == len(condition.values)


@given(st.text(alphabet=st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=40))
def test_any_string_can_be_asked_for(text: str) -> None:
    quoted = "'" + text.replace("'", "''") + "'"
    assert parse_filter(f"path = {quoted}").values == (text,)
