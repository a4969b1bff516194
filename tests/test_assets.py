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


def test_the_users_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_HOME", str(tmp_path))
    assert assets.user_folder() == tmp_path
    monkeypatch.setenv("VLM_HOME", "~/models")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.user_folder() == tmp_path / "models"
    monkeypatch.delenv("VLM_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert assets.user_folder() == tmp_path / "cache" / "vlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.user_folder() == tmp_path / ".cache" / "vlm"
    monkeypatch.setattr("sys.platform", "darwin")
    assert assets.user_folder() == tmp_path / "Library" / "Caches" / "vlm"
    assert not (tmp_path / "Library").exists()
