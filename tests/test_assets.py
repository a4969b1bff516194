"""Shipped files are found in a checkout and in an installation, and only shipped files."""

from __future__ import annotations

import pytest

from vlm import assets
from vlm.errors import InvalidInput


@pytest.mark.parametrize("folder", ["kernels", "configs", "data_tools", "eval"])
def test_the_four_folders_are_found_in_a_checkout(root, folder):
    assert assets.asset(folder) == root / folder


def test_an_installation_looks_only_into_its_own_share(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "vlm"
    inside = package / "share" / "configs" / "a.yaml"
    inside.parent.mkdir(parents=True)
    inside.write_text("")
    stranger = tmp_path / "site-packages" / "configs" / "b.yaml"
    stranger.parent.mkdir()
    stranger.write_text("")
    monkeypatch.setattr(assets, "_PACKAGE", package)
    assert assets.asset("configs/a.yaml") == inside
    with pytest.raises(InvalidInput, match=r"no shipped file 'configs/b\.yaml'"):
        assets.asset("configs/b.yaml")


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../secret", "configs/../../secret", "configs/absent.yaml"]
)
def test_what_was_not_shipped_is_refused(path):
    with pytest.raises(InvalidInput, match=r"shipped file"):
        assets.asset(path)
