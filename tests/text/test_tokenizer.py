import warnings

import pytest
import torch

from vlm.errors import InvalidInput
from vlm.text import Tokenizer, TruncationWarning, bert_tokenizer, build_tokenizer

PIECES = [
    "[PAD]",
    "[unused0]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "dog",
    "run",
    "##ning",
    "##s",
    "cafe",
]


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return Tokenizer.from_file(tmp_path / "vocab.txt")


def test_bert_cuts_words_into_pieces_between_its_marks(bert):
    batch = bert(["A dog running!", "dogs"], max_tokens=10)
    cls, sep = bert.class_id, bert.separator_id
    assert batch.input_ids.tolist() == [[cls, 6, 7, 8, 9, sep], [cls, 7, 10, sep, 0, 0]]
    assert batch.attention_mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert (bert.pad_id, bert.unknown_id, bert.mask_id, bert.vocabulary_size) == (0, 2, 5, 12)


def test_bert_strips_accents_and_keeps_marks_whole(bert):
    assert bert(["CAFÉ"], max_tokens=5).input_ids.tolist() == [[3, 11, 4]]
    assert bert(["a [MASK]"], max_tokens=5, cleaned=True).input_ids.tolist() == [[3, 6, 5, 4]]
    assert bert.decode([3, 7, 10, 4, 0]) == "dogs"


def test_it_agrees_with_the_transformers_implementation(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    ours = Tokenizer.from_file(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    for text in ("a dog running", "dogs run", "the cafe runs", "a  dogrunning", "run" * 40):
        assert ours([text], max_tokens=50, cleaned=True).input_ids[0].tolist() == theirs(text)["input_ids"]


def test_long_texts_are_cut_before_the_last_mark_with_one_warning(bert):
    with pytest.warns(
        TruncationWarning, match="2 of 3 texts are longer than 4 tokens .longest 10002"
    ) as caught:
        batch = bert(["dog " * 10_000, "a a a", "a"], max_tokens=4)
    assert len(caught) == 1
    assert batch.input_ids.tolist() == [[3, 7, 7, 4], [3, 6, 6, 4], [3, 6, 4, 0]]


def test_unknown_words_are_named_once_and_in_order(bert):
    assert bert.unknown_words("The dog, the BEACH and a dog running.") == ["the", "beach", "and"]
    assert bert.unknown_words("") == []


def test_words_become_a_vocabulary_that_survives_a_file(tmp_path):
    first = build_tokenizer(["Red three, moves left", "blue", "left"])
    assert first.vocabulary_size == 5 + 5
    assert build_tokenizer(["blue red", "moves left three"]).to_json() == first.to_json()
    first.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path)
    text = ["Blue three moves to the left"]
    assert torch.equal(again(text, max_tokens=9).input_ids, first(text, max_tokens=9).input_ids)
    assert again.unknown_words(text[0]) == ["to", "the"] == first.unknown_words(text[0])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_an_empty_text_is_two_marks():
    tokenizer = build_tokenizer(["red"])
    assert tokenizer([""], max_tokens=3).input_ids.tolist() == [[tokenizer.class_id, tokenizer.separator_id]]


@pytest.mark.parametrize(
    ("texts", "limit", "words"), [([], 8, "at least one"), ("red", 8, "got 'red'"), (["a"], 2, "at least 3")]
)
def test_wrong_arguments_are_refused(bert, texts, limit, words):
    with pytest.raises(ValueError, match=words):
        bert(texts, max_tokens=limit)


def test_no_words_make_no_vocabulary():
    with pytest.raises(ValueError, match="at least one word"):
        build_tokenizer(["...", ""])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vocab.txt", b"dog\ncat\n", r"without \[UNK\]"),
        ("vocab.txt", b"[UNK]\ndog\n", r"lacks the special tokens \[PAD\]"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"not json", "not a tokenizer.json"),
        ("vocab.txt", b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=words):
        Tokenizer.from_file(tmp_path / name)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="found neither"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(InvalidInput, match="no such tokenizer file"):
        Tokenizer.from_file(tmp_path / "vocab.txt")


def test_the_published_vocabulary_comes_from_the_cache_or_is_an_error_naming_both(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InvalidInput, match=r"--tokenizer PATH .*bert-base-uncased into the Hugging Face cache"
    ):
        bert_tokenizer()
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, name: str(tmp_path / name) if name == "vocab.txt" else None,
    )
    assert bert_tokenizer().vocabulary_size == len(PIECES)
