"""The pinned list: every entry is complete, and names that are wrong lead to the right one."""

from __future__ import annotations

import json

import pytest

import vlm.models.registry.store as store
from vlm.config import build
from vlm.errors import CheckpointError, ConfigError, IntegrityError, InvalidInput
from vlm.models.registry import (
    ModelEntry,
    ModelFile,
    find_local,
    import_model,
    list_local,
    load_registry,
    local_model,
    lookup,
    remove_model,
)

FILE = {"role": "weights", "repo": "a/b", "revision": "main", "file": "x.pth", "size_mb": 1.0}
ENTRY = {"summary": "s", "kind": "official", "licence": "MIT", "domain": "open", "capabilities": ["search"]}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_registry_holds_what_the_project_promises():
    models = load_registry()
    assert list(models) == [
        "demo",
        "demo-teacher",
        "videomamba-m-5m",
        "videomamba-m-17m",
        "videomamba-m-25m",
        "clip-b32",
        "pe-core-b",
    ]
    for name, entry in models.items():
        assert entry.licence and entry.domain and entry.capabilities, name
        assert [file.role for file in entry.files].count("weights") == (entry.kind != "folder"), name
        assert (entry.domain == "open") == (not name.startswith("demo"))
        assert ("tokenizer" in [file.role for file in entry.files]) == (entry.kind == "official")


def test_a_hash_is_whole_or_absent():
    for entry in load_registry().values():
        for file in entry.files:
            assert file.sha256 is None or len(file.sha256) == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "be3330d1"}, "sha256 must be 64"),
        ({"sha256": "g" * 64}, "sha256 must be 64"),
        ({"size_mb": 0}, "size_mb must be positive"),
        ({"role": "readme"}, "expected one of 'weights', 'tokenizer'"),
    ],
)
def test_a_wrong_file_entry_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(ModelFile, {**FILE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the other kinds have files"),
        ({"kind": "folder", "files": [FILE], "path": "x"}, "has a path and no files"),
        ({"kind": "open_clip", "files": [FILE]}, "needs architecture and pretrained"),
        ({"files": [FILE], "capabilities": ["fly"]}, r"unknown capabilities \['fly'\]"),
    ],
)
def test_a_wrong_entry_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(ModelEntry, {**ENTRY, **changes})


def test_a_wrong_name_leads_to_the_nearest():
    with pytest.raises(InvalidInput, match=r"'videomamba-25m'; did you mean 'videomamba-m-25m'\?"):
        lookup("videomamba-25m")
    with pytest.raises(InvalidInput, match="known: demo, demo-teacher, videomamba-m-5m"):
        lookup("zzz")


def test_urls_follow_the_endpoint(monkeypatch):
    file = build(ModelFile, {**FILE, "file": "a folder/x.pth", "revision": "refs/pr/1"})
    monkeypatch.delenv("VLM_MODELS_URL", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert file.url == "https://huggingface.co/a/b/resolve/refs/pr/1/a%20folder/x.pth"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    assert file.url.startswith("http://mirror/a/b/")
    monkeypatch.setenv("VLM_MODELS_URL", "http://ours")
    assert file.url.startswith("http://ours/a/b/")


def test_what_is_not_here_names_the_command_that_fetches_it(home):
    with pytest.raises(
        InvalidInput, match=r"not on this machine \(381 MB, Apache-2.0\): vlm models pull videomamba-m-25m"
    ):
        local_model("videomamba-m-25m")
    assert not home.exists()


def test_an_imported_file_stays_where_it_is(home, hub, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(hub.content)
    model = import_model(path, "mine", licence="MIT", domain="open")
    assert model.files == {"weights": path} and model.kind == "imported"
    assert local_model("mine").sha256["weights"] == hub.sha256
    assert list_local()["mine"] == model
    remove_model("mine")
    assert path.exists() and find_local("mine") is None


def test_an_imported_file_that_changed_or_vanished_is_noticed(home, hub, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(hub.content)
    import_model(path, "mine")
    path.write_bytes(hub.content + b"more")
    with pytest.raises(IntegrityError, match="had .* bytes when it came in"):
        local_model("mine")
    path.unlink()
    with pytest.raises(IntegrityError, match="is gone"):
        local_model("mine")
    assert "mine" not in list_local()


@pytest.mark.parametrize(
    ("name", "content"), [("a.pth", b"import os"), ("a.safetensors", b"{}"), ("a.bin", b"")]
)
def test_what_is_no_weights_file_is_not_imported(home, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        import_model(path, "bad")
    assert find_local("bad") is None


@pytest.mark.parametrize("name", ["", "../up", "A", "a/b", ".hidden", "x" * 65, "a\nb"])
def test_names_cannot_leave_the_store(home, tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(InvalidInput, match="a name has lower-case letters"):
        import_model(path, name)
    with pytest.raises(InvalidInput, match="nothing is stored under"):
        remove_model(name)


def test_a_file_fetched_elsewhere_can_be_handed_in(hub, publish, tmp_path):
    path = tmp_path / "usb" / "tiny.safetensors"
    path.parent.mkdir()
    path.write_bytes(hub.content)
    model = import_model(path, "tiny")
    path.unlink()
    assert model.kind == "official" and model.licence == "Apache-2.0"
    assert local_model("tiny").files["weights"].read_bytes() == hub.content
    assert hub.ranges == []


def test_a_file_handed_in_must_be_the_pinned_one(hub, publish, tmp_path):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(hub.content[::-1])
    with pytest.raises(IntegrityError, match="expected sha256"):
        import_model(path, "tiny")
    with pytest.raises(InvalidInput, match=r"tiny consists of tiny\.safetensors; got other\.safetensors"):
        import_model(path.rename(tmp_path / "other.safetensors"), "tiny")
    assert find_local("tiny") is None


def test_removing_frees_the_disk(hub, publish, tmp_path):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(hub.content)
    import_model(path, "tiny")
    assert remove_model("tiny") >= len(hub.content)
    assert not (store.store_folder() / "tiny").exists()
    with pytest.raises(
        InvalidInput, match="nothing is stored under 'tiny'; it was not pulled, or is part of"
    ):
        remove_model("tiny")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", json.dumps({"kind": "x", "licence": "y", "domain": "z", "files": 3})]
)
def test_a_damaged_record_is_named_and_does_not_break_the_list(home, text):
    record = home / "models" / "mine" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text(text)
    with pytest.raises(IntegrityError, match="damaged; vlm models remove mine"):
        local_model("mine")
    assert "mine" not in list_local()
    remove_model("mine")
