"""The package's names are loaded at first use, and each of them exists."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vlm
import vlm.models


@pytest.mark.parametrize("package", [vlm, vlm.models])
def test_every_public_name_exists(package):
    assert sorted(package.__all__) == package.__all__
    homes = {**vars(package).get("_PUBLIC", {}), **vars(package).get("_HOMES", {})}
    assert set(homes) | {"__version__"} >= set(package.__all__) >= set(homes)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'; it has"):
        _ = package.nonsense


def test_the_registry_needs_no_torch():
    code = "import sys, vlm.models.registry as r; r.load_registry(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
