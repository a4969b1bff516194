"""What an installation holds: one import name, the four folders as files, nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vlm

FOLDERS = ("kernels", "configs", "data_tools", "eval")
IGNORED = {"__pycache__"}


def tracked(root: Path, *under: str) -> list[str]:
    """Return the tracked and not ignored new files below some folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *under]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (root / name).is_file()]


def build(source: Path, out: Path, *kinds: str) -> None:
    command = [sys.executable, "-m", "build", *kinds, "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("dist")
    build(Path(__file__).resolve().parents[1], out, "--wheel")
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def project(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_vlm_is_the_only_import_name(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"vlm", f"videomamba_vlm-{vlm.__version__}.dist-info"}


def test_every_file_of_the_four_folders_is_inside(wheel, root):
    inside = set(wheel.namelist())
    expected = {f"vlm/share/{name}" for name in tracked(root, *FOLDERS)}
    assert {name.split("/")[2] for name in expected} == set(FOLDERS)
    assert expected <= inside
    assert "vlm/share/configs/models.yaml" in inside


def test_every_module_is_inside_and_nothing_else(wheel, root):
    inside = {name for name in wheel.namelist() if name.startswith("vlm/") and "/share/" not in name}
    assert inside == set(tracked(root, "vlm"))


def test_nothing_that_was_made_is_inside(wheel, root):
    shipped = {f"vlm/share/{name}" for name in tracked(root, *FOLDERS)}
    extra = [name for name in wheel.namelist() if name.startswith("vlm/share/") and name not in shipped]
    assert extra == []
    assert not [name for name in wheel.namelist() if "test" in Path(name).name and name.endswith(".py")]


def test_the_wheel_says_what_it_is(wheel):
    info = f"videomamba_vlm-{vlm.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"Version: {vlm.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert wheel.read(f"{info}/entry_points.txt").decode() == "[console_scripts]\nvlm = vlm.cli:main\n"
    assert "Root-Is-Purelib: true" in wheel.read(f"{info}/WHEEL").decode()
    assert any(name.startswith(f"{info}/licenses/LICENSE") for name in wheel.namelist())


def test_the_unpacked_wheel_finds_its_assets(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "import vlm, sys; from vlm.assets import asset; assert vlm.__file__.startswith(sys.argv[1]);"
        "[print(asset(folder)) for folder in sys.argv[2:]]"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *FOLDERS]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.stdout.split() == [str(tmp_path / "vlm" / "share" / folder) for folder in FOLDERS]


def test_the_source_distribution_builds_the_same_wheel(wheel, root, tmp_path):
    build(root, tmp_path)  # a source distribution, and the wheel from it
    (path,) = tmp_path.glob("*.whl")
    again = zipfile.ZipFile(path)
    same = [name for name in wheel.namelist() if not name.endswith("RECORD")]
    assert sorted(again.namelist()) == sorted(wheel.namelist())
    assert [name for name in same if again.read(name) != wheel.read(name)] == []


def test_only_vlm_is_a_package(root):
    assert [
        name for name in tracked(root) if name.endswith("__init__.py") and not name.startswith("vlm/")
    ] == []


def test_the_checkout_stays_small(root):
    assert sum((root / name).stat().st_size for name in tracked(root)) < 40 * 2**20


def test_the_makefile_installs_extras_that_exist(root, project):
    extras = set(project["project"]["optional-dependencies"])
    makefile = (root / "Makefile").read_text()
    named = {name for line in re.findall(r"^\w*EXTRAS =(.*)$", makefile, re.M) for name in line.split(",")}
    named = {name.strip() for name in named} - {""}
    assert named and named <= extras


def test_every_extra_that_a_message_names_exists(root, project):
    extras = set(project["project"]["optional-dependencies"])
    named = set()
    for name in tracked(root, "vlm", *FOLDERS):
        if name.endswith(".py"):
            text = (root / name).read_text(encoding="utf-8")
            named |= set(re.findall(r"videomamba-vlm\[([\w-]+)\]", text))
            named |= {call.args[1].value for call in calls(ast.parse(text), "MissingExtra")}
    assert named <= extras


def calls(tree: ast.Module, function: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == function
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    ]
