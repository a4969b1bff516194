"""`.ci/install` chooses the PyTorch that fits the machine, and says what it will fetch before it does."""

from __future__ import annotations

import os
import subprocess

import pytest

CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"

# plays the interpreter: it makes the environment, answers the probes, and notes what pip was asked for
PYTHON = """#!/bin/sh
case "$1" in
    -V) echo "Python $FAKE_VERSION" ;;
    -m) case "$2" in
            venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" ;;
            pip) shift 2; echo "$@" >> "$FAKE_LOG" ;;
        esac ;;
    -c) case "$2" in
            *version_info*) [ "$FAKE_VERSION" != 3.10 ] ;;
            *torch*) [ -n "$FAKE_TORCH" ] ;;
        esac ;;
    -) [ -n "$FAKE_REACHABLE" ] ;;
esac
"""


@pytest.fixture
def install(root, tmp_path):
    """Run the script among stand-ins; return its output and pip's arguments, one line a call."""

    def run(extras="dev", *pip_args, gpu=False, reachable=False, torch=False, version="3.11"):
        tools = tmp_path / "tools"
        tools.mkdir()
        scripts = {"python3": PYTHON, "nvidia-smi": f"#!/bin/sh\nexit {0 if gpu else 9}\n"}
        for name, text in scripts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        log = tmp_path / "pip.log"
        log.touch()
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "FAKE_LOG": str(log),
            "FAKE_VERSION": version,
            "FAKE_REACHABLE": "yes" if reachable else "",
            "FAKE_TORCH": "yes" if torch else "",
        }
        command = [
            str(root / ".ci" / "install"),
            str(tools / "python3"),
            str(tmp_path / "venv"),
            extras,
            *pip_args,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done, log.read_text().splitlines()

    return run


def test_without_a_gpu_the_cpu_build_is_fetched(install):
    done, (torch, package) = install(reachable=True)
    assert done.returncode == 0, done.stderr
    assert "CPU build of PyTorch, about 190 MB" in done.stdout
    assert CPU_INDEX in torch and torch.endswith(" torch") and "-c constraints.txt" in torch
    assert CPU_INDEX in package and package.endswith("-e .[dev]")


def test_with_a_gpu_the_indexs_own_build_is_fetched(install):
    done, calls = install(gpu=True, reachable=True)
    assert "A GPU answers" in done.stdout
    assert len(calls) == 2 and not [call for call in calls if "extra-index-url" in call]


def test_where_the_cpu_builds_cannot_be_reached_pips_own_index_serves(install):
    done, calls = install(reachable=False)
    assert done.returncode == 0
    assert "cannot be reached" in done.stdout and "3000 MB for a CUDA build" in done.stdout
    assert len(calls) == 2 and not [call for call in calls if "extra-index-url" in call]


def test_a_torch_that_is_there_is_kept(install):
    done, calls = install(torch=True, reachable=True)
    assert "PyTorch" not in done.stdout
    assert not [call for call in calls if "extra-index-url" in call]


def test_arguments_for_pip_and_no_extras(install):
    _done, (torch, package) = install("", "--find-links", "/wheels", torch=True)
    assert "--find-links /wheels" in torch
    assert package.endswith("--find-links /wheels -e .")


def test_an_old_python_is_refused_with_what_to_do(install):
    done, calls = install(version="3.10")
    assert done.returncode == 1 and calls == []
    assert "Python 3.11 or later is needed" in done.stderr and "make PYTHON=" in done.stderr
