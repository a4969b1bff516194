"""`vlm models`: consent before a download, codes and words for people, JSON for programs."""

from __future__ import annotations

import io
import json

import pytest

from vlm.cli import main
from vlm.models import registry
from vlm.models.registry import entries


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VLM_OFFLINE", "1")
    return tmp_path / "home"


@pytest.fixture
def fetched(monkeypatch):
    """Replace the transfer; return the names that were fetched."""
    names = []

    class Local:
        files = {"weights": "/somewhere/weights.pth"}

    def download(name, _entry):
        names.append(name)
        return Local, {"weights.pth": "ab" * 32}

    monkeypatch.delenv("VLM_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(registry, "download_model", download)
    return names


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_list_shows_every_model(capsys):
    assert main(["models", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "MB", "LICENCE", "DOMAIN", "CAN", "HERE"]
    assert [line.split()[0] for line in lines[1:]] == list(entries.load_registry())
    row = next(line for line in lines if line.startswith("videomamba-m-25m"))
    assert row.split() == ["videomamba-m-25m", "381", "Apache-2.0", "open", "search,rerank,choose", "no"]


def test_list_and_show_speak_json(capsys):
    assert main(["models", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert main(["models", "show", "clip-b32", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == next(row for row in rows if row["name"] == "clip-b32")
    assert shown["files"][0]["sha256"] == entries.lookup("clip-b32").files[0].sha256
    assert shown["here"] == []


def test_show_says_source_hash_and_score(capsys):
    assert main(["models", "show", "videomamba-m-25m"]) == 0
    out = capsys.readouterr().out
    entry = entries.lookup("videomamba-m-25m")
    assert all(file.url in out and file.sha256 in out for file in entry.files)
    assert "35.6" in out and "Apache-2.0" in out


@pytest.mark.parametrize("action", ["show", "pull"])
def test_a_wrong_name_is_invalid_input(capsys, action):
    assert main(["models", action, "videomamba"]) == 4
    assert "did you mean" in capsys.readouterr().err


def test_pull_shows_licence_and_size_and_asks(fetched, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert main(["models", "pull", "videomamba-m-5m"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "/somewhere/weights.pth\n"
    assert printed.err.index("licence Apache-2.0; 381 MB") < printed.err.index("fetch it? [y/N]")
    assert f"pinned now to sha256 {'ab' * 32}" in printed.err
    assert fetched == ["videomamba-m-5m"]


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "maybe\n"])
def test_anything_but_yes_fetches_nothing(fetched, capsys, monkeypatch, answer):
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert main(["models", "pull", "videomamba-m-5m"]) == 1
    assert capsys.readouterr().err.endswith("vlm: nothing was fetched\n")
    assert fetched == []


def test_without_a_terminal_consent_needs_its_flag(fetched, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["models", "pull", "videomamba-m-5m"]) == 2
    assert "vlm models pull videomamba-m-5m --yes" in capsys.readouterr().err
    assert fetched == []
    assert main(["models", "pull", "videomamba-m-5m", "--yes"]) == 0
    assert fetched == ["videomamba-m-5m"]


def test_pull_offline_says_what_to_do(capsys, home):
    assert main(["models", "pull", "videomamba-m-5m", "--yes"]) == 4
    assert "VLM_OFFLINE=1 forbids the network" in capsys.readouterr().err
    assert not home.exists()


def test_import_list_show_remove(capsys, tmp_path):
    from safetensors.torch import save_file
    from torch import ones

    path = tmp_path / "mine.safetensors"
    save_file({"weight": ones(3)}, path)
    assert main(["models", "import", str(path), "--name", "mine", "--licence", "MIT"]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["mine", "0", "MIT", "unknown", "-", "yes"]
    assert main(["models", "show", "mine"]) == 0
    assert str(path) in capsys.readouterr().out
    assert main(["models", "remove", "mine"]) == 0
    assert main(["models", "remove", "mine"]) == 4
    assert path.exists()


@pytest.mark.parametrize(
    "argv", [["models"], ["models", "fly"], ["models", "pull"], ["models", "import", "x"]]
)
def test_incomplete_commands_are_usage_errors(capsys, argv):
    assert main(argv) == 2
