"""Every shipped protocol loads and names itself; wrong ones are refused."""

from __future__ import annotations

import pytest

from vlm.errors import InvalidInput, UsageError
from vlm.evaluation import load_protocol, protocol_files
from vlm.evaluation import protocol as module
from vlm.types import Preprocessing


@pytest.mark.parametrize("name", sorted(protocol_files()))
def test_shipped_protocols(name):
    protocol = load_protocol(name)
    assert protocol.name == name
    assert protocol.summary
    assert protocol.bootstrap.resamples >= 1000


def test_world_is_pinned():
    protocol = load_protocol("world")
    assert protocol.version == 1
    assert protocol.recall_at == (1, 5, 10, 50)
    assert (protocol.positives, protocol.captions, protocol.sampling) == ("all-true", "first", "middle")


def test_overrides_and_refusals(tmp_path, monkeypatch):
    assert load_protocol("world", ("rerank_k=8",)).rerank_k == 8
    with pytest.raises(UsageError, match="rerank_k"):
        load_protocol("world", ("rerankk=8",))
    with pytest.raises(UsageError, match="at least 100"):
        load_protocol("world", ("bootstrap.resamples=3",))
    with pytest.raises(UsageError, match="recall_at"):
        load_protocol("world", ("recall_at=[0]",))
    with pytest.raises(InvalidInput, match="no protocol 'kinetics'; expected one of .*world"):
        load_protocol("kinetics")
    with pytest.raises(InvalidInput, match="no protocol 'msrvtt-1k'; did you mean 'msrvtt-1ka'"):
        load_protocol("msrvtt-1k")
    (tmp_path / "mine.yaml").write_text("name: other\nversion: 1\nsummary: x\nlayout: world\n")
    monkeypatch.setattr(module, "asset", lambda _: tmp_path)
    with pytest.raises(InvalidInput, match="name is 'other', expected 'mine'"):
        load_protocol("mine")


def test_other_frames_than_the_published_ones_are_said():
    protocol = load_protocol("msrvtt-1ka")
    assert protocol.deviations(Preprocessing(num_frames=8)) == []
    assert protocol.deviations(Preprocessing(num_frames=12, image_size=384)) == [
        "frames: 12 instead of 8",
        "image_size: 384 instead of 224",
    ]
    assert load_protocol("own").deviations(Preprocessing(num_frames=3)) == []
