"""Downloads: whole, cut, resumed, lied about, refused; what is in place is always what was pinned."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

import vlm.models.registry.download as download
from vlm.errors import BusyError, IntegrityError, InvalidInput, NoSpaceError
from vlm.models.registry import download_model, find_local, local_model, lookup, store_folder

HALF = 200_000


def pull():
    return download_model("tiny", lookup("tiny"))


def stored() -> Path:
    return store_folder() / "tiny" / "tiny.safetensors"


def leftovers() -> list[str]:
    return sorted(path.name for path in stored().parent.iterdir())


def test_a_whole_download_is_put_in_place(hub, publish):
    local, pinned = pull()
    assert local.files["weights"] == stored()
    assert stored().read_bytes() == hub.content
    assert local.sha256["weights"] == hub.sha256
    assert pinned == {}
    assert leftovers() == ["record.json", "tiny.safetensors"]
    assert local_model("tiny") == local


def test_what_is_here_is_not_fetched_again(hub, publish):
    pull()
    sent = hub.sent
    pull()
    assert hub.sent == sent


def test_a_cut_connection_is_taken_up_where_it_broke(hub, publish):
    hub.cut_after = [HALF]
    pull()
    assert hub.ranges == [None, f"bytes={HALF}-"]
    assert hub.sent == len(hub.content)
    assert stored().read_bytes() == hub.content


def test_a_later_command_takes_up_what_an_earlier_one_left(hub, publish):
    hub.cut_after = [HALF, 0, 0, 0]
    with pytest.raises(BusyError, match=r"3 tries without progress at 0\.2 of .* run the same command again"):
        pull()
    assert not stored().exists()
    assert find_local("tiny") is None
    hub.sent = 0
    pull()
    assert hub.sent == len(hub.content) - HALF
    assert stored().read_bytes() == hub.content


def test_a_server_that_ignores_ranges_is_asked_for_everything(hub, publish):
    hub.cut_after, hub.honours_range = [HALF], False
    pull()
    assert stored().read_bytes() == hub.content
    assert hub.sent == HALF + len(hub.content)


def test_another_version_on_the_server_is_not_glued_to_the_old_beginning(hub, publish):
    hub.cut_after = [HALF, 0, 0, 0]
    with pytest.raises(BusyError):
        pull()
    hub.content, hub.tag = hub.content[::-1], '"v2"'
    publish(sha256=hub.sha256)
    pull()
    assert stored().read_bytes() == hub.content


def test_a_beginning_of_unknown_origin_is_dropped(hub, publish):
    stored().parent.mkdir(parents=True)
    stored().with_name("tiny.safetensors.part").write_bytes(b"somebody else's bytes")
    pull()
    assert hub.ranges == [None]
    assert stored().read_bytes() == hub.content


def test_a_beginning_longer_than_the_file_is_dropped(hub, publish):
    stored().parent.mkdir(parents=True)
    partial = stored().with_name("tiny.safetensors.part")
    partial.write_bytes(bytes(len(hub.content) + 5))
    partial.with_name(f"{partial.name}.etag").write_text(hub.tag)
    pull()
    assert stored().read_bytes() == hub.content


def test_a_wrong_hash_is_refused_and_thrown_away(hub, publish):
    publish(sha256="0" * 64)
    with pytest.raises(
        IntegrityError, match=f"expected sha256 {'0' * 64}, got {hub.sha256}; it was deleted"
    ) as caught:
        pull()
    assert caught.value.exit_code == 5
    assert not stored().exists()
    assert all(not name.endswith((".part", ".safetensors")) for name in leftovers())


def test_a_wrong_size_is_refused_before_the_transfer(hub, publish):
    publish(size_bytes=len(hub.content) + 1)
    with pytest.raises(
        IntegrityError, match=rf"expected {len(hub.content) + 1} bytes, got {len(hub.content)}"
    ):
        pull()
    assert not stored().exists()


def test_a_rounded_size_must_agree_to_a_hundredth(hub, publish):
    publish(size_bytes=None, size_mb=len(hub.content) / 1e6 * 1.005)
    pull()
    publish(size_bytes=None, size_mb=len(hub.content) / 1e6 * 1.02, file="other.safetensors")
    with pytest.raises(IntegrityError, match=r"expected about .* MB, got"):
        pull()


def test_an_unpublished_hash_is_pinned_by_the_first_download(hub, publish):
    publish(sha256=None)
    _local, pinned = pull()
    assert pinned == {"tiny.safetensors": hub.sha256}
    stored().unlink()
    hub.content = hub.content[::-1]
    with pytest.raises(IntegrityError, match="expected sha256"):
        pull()


def test_the_hash_that_the_hub_states_is_checked_when_nobody_published_one(hub, publish):
    publish(sha256=None)
    hub.stated_sha256 = "1" * 64
    with pytest.raises(IntegrityError, match=f"expected sha256 {'1' * 64}"):
        pull()
    hub.stated_sha256 = hub.sha256
    pull()
    assert stored().read_bytes() == hub.content


def test_a_damaged_file_in_place_is_fetched_again(hub, publish):
    pull()
    stored().write_bytes(b"rot")
    with pytest.raises(IntegrityError, match=r"had \d+ bytes when it came in, now 3"):
        local_model("tiny")
    pull()
    assert stored().read_bytes() == hub.content


@pytest.mark.parametrize("variable", ["VLM_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_mode_says_what_to_do(hub, publish, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(InvalidInput, match=rf"{variable}=1 forbids the network.*vlm models import") as caught:
        pull()
    assert caught.value.exit_code == 4
    assert hub.ranges == []


def test_offline_mode_does_not_disturb_what_is_here(hub, publish, monkeypatch):
    pull()
    monkeypatch.setenv("VLM_OFFLINE", "1")
    assert pull()[0].files["weights"] == stored()


def test_an_unreachable_server_says_what_to_do(hub, publish, monkeypatch):
    monkeypatch.setenv("VLM_MODELS_URL", "http://127.0.0.1:9")
    with pytest.raises(InvalidInput, match=r"cannot reach http://127\.0\.0\.1:9/.*VLM_MODELS_URL"):
        pull()


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_named(hub, publish, status):
    hub.status = [status]
    with pytest.raises(InvalidInput, match=rf"someone/tiny/resolve/abc/tiny\.safetensors answers {status}"):
        pull()


def test_an_overloaded_server_is_tried_again(hub, publish):
    hub.status = [503, 429]
    pull()
    assert stored().read_bytes() == hub.content


def test_a_server_that_stays_overloaded_is_a_busy_error(hub, publish):
    hub.status = [503] * 9
    with pytest.raises(BusyError, match="503"):
        pull()


def test_a_disk_that_would_not_hold_it_is_found_before_the_transfer(hub, publish, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(download.shutil, "disk_usage", lambda _path: Usage)
    with pytest.raises(NoSpaceError, match=r"needs 1 MB, 0 MB are free; .*VLM_HOME") as caught:
        pull()
    assert caught.value.exit_code == 6


def test_a_disk_that_fills_up_keeps_what_came(hub, publish, monkeypatch):
    written = []

    class FullDisk(download._Transfer):
        def _receive(self):
            written.append(self.stream.write(hub.content[:HALF]))
            self.stream.flush()
            download._tag_path(Path(self.stream.name)).write_text(hub.tag)
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(download, "_Transfer", FullDisk)
        with pytest.raises(NoSpaceError, match="free some and run again to go on"):
            pull()
    assert written == [HALF]
    pull()
    assert hub.ranges == [f"bytes={HALF}-"]
    assert stored().read_bytes() == hub.content


def test_two_processes_do_not_fetch_the_same_file(hub, publish):
    stored().parent.mkdir(parents=True)
    with stored().with_name("tiny.safetensors.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="another process is fetching it") as caught:
            pull()
    assert caught.value.exit_code == 75


def test_encryption_is_not_given_up_on_the_way(hub, publish):
    transfer = download._Transfer(lookup("tiny").files[0], stream=None)
    request = download.urllib.request.Request("https://hub/a")
    with pytest.raises(InvalidInput, match="not encrypted"):
        download._Redirects(transfer).redirect_request(request, None, 302, "Found", {}, "http://hub/b")
