"""Rules of the source tree that machines can hold: import direction, one home per library, sizes."""

from __future__ import annotations

import ast
import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SINGLE_HOME = ("deepspeed", "faiss", "webdataset", "lancedb", "ray", "open_clip", "peft")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FILES = 12
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc", "core"}
ROOT = Path(__file__).resolve().parents[1]


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Return the top-level names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return frozenset(names)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package that a test may spoil."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vlm", tmp_path / "vlm", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("errors.py", "import vlm.cli", "vlm.errors -> vlm.cli"),
        ("metrics/retrieval.py", "import torch", "vlm.metrics.retrieval -> torch"),
        ("losses/contrastive.py", "import vlm.models", "vlm.losses.contrastive -> vlm.models"),
    ],
)
def test_the_contract_notices_a_wrong_import(copy, module, line, broken):
    path = copy / "vlm" / module
    text = path.read_text(encoding="utf-8")
    marker = "from __future__ import annotations\n"
    assert marker in text
    path.write_text(text.replace(marker, f"{marker}{line}\n", 1), encoding="utf-8")
    done = lint_imports(copy)
    assert done.returncode == 1
    assert broken in done.stdout


def test_the_contract_holds_as_it_is(copy):
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("library", SINGLE_HOME)
def test_a_library_has_one_home(library):
    homes = [str(path.relative_to(ROOT)) for path in sources("vlm") if library in imported(path)]
    assert len(homes) <= 1, homes


def test_no_module_of_the_package_imports_the_programs():
    programs = {"kernels", "configs", "data_tools", "eval", "tests"}
    assert {
        str(path): imported(path) & programs for path in sources("vlm") if imported(path) & programs
    } == {}


def test_programs_do_not_import_one_another():
    programs = {"kernels", "data_tools", "eval"}
    assert [str(path) for path in sources(*programs) if imported(path) & programs] == []


def test_files_and_functions_stay_readable():
    too_long = []
    for path in sources("vlm", "eval", "data_tools"):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert too_long == []


def test_folders_stay_small_and_names_say_something():
    folders = {path.parent for path in sources("vlm")}
    crowded = {
        str(folder): count for folder in folders if (count := len(list(folder.glob("*.py")))) > MAX_FILES + 1
    }
    assert crowded == {}
    assert [str(path) for path in sources("vlm") if path.stem in BANNED_NAMES] == []


def test_models_and_ops_need_four_libraries_only():
    """They must import on a machine that has torch, numpy, einops and safetensors and nothing else."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"yaml", "tqdm", "av", "PIL", "tokenizers", "huggingface_hub", "webdataset",
                                  "faiss", "deepspeed", "transformers", "open_clip", "sklearn", "matplotlib"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import vlm.ops, vlm.models
[getattr(vlm.models, name) for name in vlm.models.__all__]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
