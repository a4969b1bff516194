import os
import resource
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from vlm.errors import CheckpointError
from vlm.models import load_model
from vlm.models.weights import read_state_dict


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_both_formats_give_the_same_tensors(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    torch.save(tensors, tmp_path / "x.pth")
    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        found = read_state_dict(tmp_path / name)
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", ["x.pth", "x.bin", "model.pt"])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, name):
    marker = tmp_path / "marker"
    torch.save({"a": Payload(marker)}, tmp_path / name)
    for read in (read_state_dict, load_model):
        with pytest.raises(CheckpointError, match="refused or damaged"):
            read(tmp_path / name)
    assert not marker.exists()


def test_a_small_file_that_claims_a_thousand_million_elements_is_refused_cheaply(tmp_path):
    path = tmp_path / "lie.pth"
    shape = (1000, 1000, 1000)
    keys = ("patch_embed.proj.weight", "layers.0.mixer.in_proj.weight")
    torch.save({key: torch.zeros(1).expand(shape) for key in keys}, path)
    assert path.stat().st_size < 3000
    before = peak_mb()
    with pytest.raises(CheckpointError, match=r"claims 4000000000 bytes .* the file holds 4"):
        load_model(path)
    assert peak_mb() - before < 50


def test_compressed_archives_are_refused(tmp_path):
    torch.save({"a": torch.zeros(4_000_000)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in source.namelist():
            bomb.writestr(member, source.read(member))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="a compressed archive"):
        read_state_dict(tmp_path / "bomb.pth")


@pytest.mark.parametrize("cut", [0.3, 0.9])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_torn_files_are_refused(tmp_path, name, cut):
    tensors = {"a": torch.randn(100, 100)}
    path = tmp_path / name
    torch.save(tensors, path) if name.endswith("pth") else save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(CheckpointError, match=name):
        read_state_dict(path)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_state_dict(tmp_path / name)


def test_a_safetensors_head_that_lies_is_refused(tmp_path):
    head = b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"\0" * 64)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_state_dict(tmp_path / "x.safetensors")


def test_what_is_missing_or_no_dictionary_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such weights file"):
        read_state_dict(tmp_path / "absent.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, got list"):
        read_state_dict(tmp_path / "list.pth")


def test_sparse_tensors_are_refused(official, tmp_path):
    state = {**official("videomamba_cls_tiny").state_dict, "head.bias": torch.zeros(10).to_sparse()}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="head.bias is a torch.sparse_coo tensor"):
        load_model(tmp_path / "x.pth")
