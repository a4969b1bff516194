"""Labels in every layout, made up after the real files' form; wrong files are named."""

import json

import pytest

from vlm.data.annotations.labels import read_classes, read_labelled
from vlm.data.sources import LabelledVideos
from vlm.errors import DataError


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_file


def pairs(data):
    return {name: data.classes[label] for name, label in zip(data.names, data.labels, strict=True)}


@pytest.mark.parametrize(
    "text", ["a b/x 1.mp4 0\ny.mp4 2\n\n", "a b/x 1.mp4,0\ny.mp4,2\n", "a b/x 1.mp4,0,61.5\ny.mp4,2,9\n"]
)
def test_lines_of_path_and_number(write, tmp_path, text):
    data = read_labelled(write("train.csv", text), tmp_path)
    assert data.names == ("a b/x 1.mp4", "y.mp4") and data.labels == (0, 2)
    assert data.classes == ("0", "1", "2")
    assert data.paths == (None, None) and data.reasons == ("missing", "missing")


def test_files_are_found_with_and_without_extension_and_never_outside(write, tmp_path):
    write("videos/x.mp4", "-")
    write("videos/sub/y.webm", "-")
    write("secret.mp4", "-")
    data = read_labelled(write("l.txt", "x.mp4 0\nsub/y 1\n../secret.mp4 0\n"), tmp_path / "videos")
    assert [path and path.name for path in data.paths] == ["x.mp4", "y.webm", None]
    assert data.reasons == ("", "", "unsafe_name")


def test_names_of_classes_from_a_file_or_from_the_labels(write, tmp_path):
    labels = write("l.txt", "x.mp4 tea\ny.mp4 coffee\n")
    assert pairs(read_labelled(labels, tmp_path)) == {"x.mp4": "tea", "y.mp4": "coffee"}
    assert read_labelled(labels, tmp_path).classes == ("coffee", "tea")
    named = read_labelled(labels, tmp_path, classes=write("c.txt", "milk\ntea\ncoffee\n"))
    assert named.labels == (1, 2)
    numbers = read_labelled(write("n.txt", "x.mp4 2\n"), tmp_path, classes=("milk", "tea", "coffee"))
    assert pairs(numbers) == {"x.mp4": "coffee"}


def test_a_table_and_kinetics(write, tmp_path):
    table = write("t.csv", 'label,path\n"abseiling, indoors",x.mp4\narchery,y.mp4\n')
    assert pairs(read_labelled(table, tmp_path)) == {"x.mp4": "abseiling, indoors", "y.mp4": "archery"}
    kinetics = write(
        "k.csv",
        "label,youtube_id,time_start,time_end,split\narchery,-3B32lodo2M,59,69,train\nbowling,-7kbO0v4hag,107,117,val\n",
    )
    assert pairs(read_labelled(kinetics, tmp_path)) == {
        "-3B32lodo2M_000059_000069": "archery",
        "-7kbO0v4hag_000107_000117": "bowling",
    }
    assert read_labelled(kinetics, tmp_path, part="val").names == ("-7kbO0v4hag_000107_000117",)


def test_a_task_of_lvu(write, tmp_path):
    """The class is the number: the unknown writer is called \\N, and names sort otherwise than numbers do."""
    text = "class_id class_name youtube_id imdb_id\n1 Aa -2KGPYEFnsU tt1\n0 \\N 0QNpXi4k5eU tt2\n"
    data = read_labelled(write("test.csv", text), tmp_path)
    assert (data.names, data.labels) == (("-2KGPYEFnsU", "0QNpXi4k5eU"), (1, 0))
    assert data.classes == ("0", "1")
    with pytest.raises(DataError, match=r"expected columns class_id.*\['2', 'Bb'\]"):
        read_labelled(write("torn.csv", text + "2 Bb\n"), tmp_path)


def test_something_something(write, tmp_path):
    rows = [
        {"id": "78687", "label": "holding a potato", "template": "Holding [one] next to [another]"},
        {"id": "42326", "label": "pushing a pen", "template": "Pushing [something] from left to right"},
    ]  # fmt: skip
    classes = write(
        "labels.json",
        {"Pushing something from left to right": "1", "Holding one next to another": "0"},
    )
    data = read_labelled(write("train.json", rows), tmp_path, classes=classes)
    assert (data.names, data.labels) == (("78687", "42326"), (0, 1))
    assert data.classes[1] == "Pushing something from left to right"


def test_coin_and_its_parts(write, tmp_path):
    entry = {
        "class": "MakeCoffee",
        "subset": "training",
        "recipe_type": 3,
        "duration": 60.0,
        "annotation": [],
    }
    coin = write(
        "COIN.json",
        {"database": {"abc": entry, "def": {**entry, "class": "AssembleBed", "subset": "testing"}}},
    )
    assert pairs(read_labelled(coin, tmp_path)) == {"abc": "MakeCoffee", "def": "AssembleBed"}
    assert read_labelled(coin, tmp_path, part="training").names == ("abc",)
    with pytest.raises(DataError, match="part validation: holds no labelled video"):
        read_labelled(coin, tmp_path, part="validation")


def test_a_part_of_a_layout_without_parts_is_refused(write, tmp_path):
    with pytest.raises(
        DataError, match="the layout 'lines' has no parts, got part 'training'.*kinetics, coin"
    ):
        read_labelled(write("l.txt", "x.mp4 0\n"), tmp_path, part="training")


def test_characters_that_end_lines_elsewhere_end_none_here(write, tmp_path):
    text = "x.mp4,make\u2028tea\ny.mp4,boil\x0cwater\n"
    expected = {"x.mp4": "make\u2028tea", "y.mp4": "boil\x0cwater"}
    assert pairs(read_labelled(write("l.csv", text), tmp_path)) == expected
    assert pairs(read_labelled(write("t.csv", "path,label\n" + text), tmp_path)) == expected
    names = tuple(sorted(expected.values()))
    assert read_classes(write("c.txt", "\n".join(names))) == names


def test_breakfast_and_a_folder_for_each_class(write, tmp_path):
    data = read_labelled(write("b.txt", "P03/cam01/P03_cereals.avi\nP04/cam01/P04_friedegg.avi\n"), tmp_path)
    assert pairs(data) == {"P03/cam01/P03_cereals.avi": "cereals", "P04/cam01/P04_friedegg.avi": "friedegg"}
    for name in ("jump/a.mp4", "jump/b.mp4", "run/far/c.mp4", "lost.mp4"):
        write(f"clips/{name}", "-")
    data = read_labelled(tmp_path / "clips", tmp_path / "elsewhere")
    assert pairs(data) == {"jump/a.mp4": "jump", "jump/b.mp4": "jump", "run/far/c.mp4": "run"}
    assert None not in data.paths


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "x.mp4 0\nx.mp4 1\n", "x.mp4 has two labels, 0 and 1"),
        ("l.txt", "x.mp4 7\n", "labelled 7, which is none of the 2 classes"),
        ("l.txt", "x.mp4 tea\n", "labelled 'tea', which is none of the 2 classes"),
        ("l.txt", "x.mp4 0\ny.mp4\n", "line 2: expected a path and a label"),
        ("l.txt", "", "holds no labelled video"),
        ("h.csv", "clip,label\nx.mp4,0\n", "line 1 names columns.*video_path.*class_name"),
        ("h.csv", "\nvideo,category\nx.mp4,a\n", "line 2 names columns"),
        ("t.csv", "label,path\n,x.mp4\n", "a row has no path or no label"),
        ("k.csv", "label,youtube_id,time_start,time_end\na,b,c,9\n", "line 2: expected label, youtube_id"),
        ("s.json", [{"id": "1"}], "expected a list of objects with id and template"),
        ("c.json", {"videos": {}}, "expected COIN's database"),
        ("j.json", "{", "not JSON"),
    ],
)
def test_wrong_files_are_named(write, tmp_path, name, content, message):
    path = write(name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_labelled(path, tmp_path, classes=("a", "b"))
    assert str(path) in str(caught.value) and caught.value.reason == "bad_annotations"
    with pytest.raises(DataError, match="cannot be read"):
        read_labelled(tmp_path / "absent.csv", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.txt", "run\njump far\n"),
        ("c.csv", "id,name\n1,jump far\n0,run\n"),
        ("c.csv", "0,run\n1,jump far\n"),
        ("c.json", ["run", "jump far"]),
        ("c.json", {"jump far": "1", "run": 0}),
    ],
)
def test_lists_of_classes(write, name, content):
    assert read_classes(write(name, content)) == ("run", "jump far")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.txt", ""),
        ("c.txt", "run\nrun\n"),
        ("c.csv", "0,run\n2,jump\n"),
        ("c.json", {"run": "x"}),
        ("c.json", 3),
    ],
)
def test_wrong_lists_of_classes(write, name, content):
    with pytest.raises(DataError, match="expected"):
        read_classes(write(name, content))


def test_a_source_says_what_is_missing_and_its_order_follows_names_and_labels(write, tmp_path):
    data = read_labelled(write("l.txt", "x.mp4 0\ny.mp4 1\n"), tmp_path)
    source = LabelledVideos(data)
    assert source.shard_sizes == (2,) and source.locate(0, 1) == {"video": "y.mp4"}
    with pytest.raises(DataError, match=r"x\.mp4: no such video") as caught:
        source.load(0, 0, lambda available: [0])
    assert caught.value.reason == "missing"
    other = LabelledVideos(read_labelled(write("m.txt", "x.mp4 0\ny.mp4 0\n"), tmp_path))
    assert source.fingerprint != other.fingerprint


def test_a_comma_in_a_name_is_part_of_it(write):
    assert read_classes(write("c.txt", "abseiling, indoors\nrun\n")) == ("abseiling, indoors", "run")
    assert read_classes(write("d.txt", "abseiling, indoors\n")) == ("abseiling, indoors",)
