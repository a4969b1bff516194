"""Text to token ids and back, from a ``tokenizer.json`` or BERT's ``vocab.txt``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm.errors import InvalidInput
from vlm.text.cleaning import clean
from vlm.types import TokenBatch

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

PAD, UNKNOWN, CLASS, SEPARATOR, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_WORD = 100


class TruncationWarning(UserWarning):
    """Texts were longer than the model reads; their ends were dropped."""


class Tokenizer:
    """Cut texts into ``[CLS] ... [SEP]`` token ids.

    Attributes:
        vocabulary_size: Number of ids.
        pad_id, unknown_id, class_id, separator_id, mask_id: Ids of the special tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        found = {token: engine.token_to_id(token) for token in SPECIAL}
        ids = {token: number for token, number in found.items() if number is not None}
        absent = [token for token in SPECIAL if token not in ids]
        if absent:
            raise InvalidInput(
                f"the tokenizer lacks the special tokens {', '.join(absent)}; use BERT's vocabulary"
            )
        self.pad_id: int = ids[PAD]
        self.unknown_id: int = ids[UNKNOWN]
        self.class_id: int = ids[CLASS]
        self.separator_id: int = ids[SEPARATOR]
        self.mask_id: int = ids[MASK]
        self.vocabulary_size: int = engine.get_vocab_size(with_added_tokens=True)
        engine.no_truncation()
        engine.no_padding()

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Read a ``tokenizer.json``, a ``vocab.txt`` (one token a line), or the folder of either.

        Raises:
            InvalidInput: There is no such file, or it is neither of the two.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
            if not found:
                raise InvalidInput(
                    f"{path}: expected tokenizer.json or vocab.txt in this folder, found neither"
                )
            path = found[0]
        if not path.is_file():
            raise InvalidInput(f"{path}: no such tokenizer file; give a tokenizer.json or BERT's vocab.txt")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{path}: cannot be read as text: {error}") from error
        return cls.from_json(text, str(path)) if path.suffix == ".json" else cls.from_words(text.splitlines())

    @classmethod
    def from_json(cls, text: str, where: str = "tokenizer") -> Tokenizer:
        """Read the content of a ``tokenizer.json``.

        Raises:
            InvalidInput: It is not one, or lacks the special tokens.
        """
        from tokenizers import Tokenizer as Engine

        try:
            engine = Engine.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise InvalidInput(f"{where}: not a tokenizer.json: {error}") from error
        return cls(engine)

    @classmethod
    def from_words(cls, pieces: Sequence[str]) -> Tokenizer:
        """Build BERT's lower-case WordPiece tokenizer from its vocabulary, ids in order.

        Raises:
            InvalidInput: The special tokens are missing.
        """
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, normalizers, pre_tokenizers
        from tokenizers.models import WordPiece

        vocabulary = {piece.strip(): index for index, piece in enumerate(pieces)}
        if UNKNOWN not in vocabulary:
            raise InvalidInput(
                f"a vocabulary of {len(pieces)} lines without {UNKNOWN}; expected BERT's vocab.txt"
            )
        engine = Engine(WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD))
        engine.normalizer = normalizers.BertNormalizer(lowercase=True)
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        engine.decoder = decoders.WordPiece()
        return cls(_finish(engine))

    def __call__(self, texts: Sequence[str], *, max_tokens: int, cleaned: bool = False) -> TokenBatch:
        """Tokenise texts, padded to the longest.

        Args:
            texts: At least one text.
            max_tokens: Longest result, with the two special tokens; ends are dropped with a warning.
            cleaned: Whether the texts went through ``clean`` already.

        Raises:
            ValueError: There is no text, ``texts`` is a single string, or ``max_tokens`` is below 3.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"expected a list of at least one text, got {texts!r}")
        if max_tokens < 3:
            raise ValueError(f"max_tokens must be at least 3, got {max_tokens}")
        ready = list(texts) if cleaned else [clean(text) for text in texts]
        rows = [encoding.ids for encoding in self._engine.encode_batch(ready)]
        longest = max(len(row) for row in rows)
        if longest > max_tokens:
            count = sum(len(row) > max_tokens for row in rows)
            warnings.warn(
                f"{count} of {len(rows)} texts are longer than {max_tokens} tokens (longest {longest}); "
                "their ends are ignored",
                TruncationWarning,
                stacklevel=2,
            )
            rows = [
                row if len(row) <= max_tokens else [*row[: max_tokens - 1], self.separator_id] for row in rows
            ]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[index, : len(row)] = 1
        return TokenBatch(ids, mask)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of ``text`` that the vocabulary cannot express, once each, in order."""
        words = list(dict.fromkeys(clean(text).split()))
        return [word for word in words if self.unknown_id in self._engine.encode(word).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens."""
        text: str = self._engine.decode(list(ids), skip_special_tokens=True)
        return text

    def to_json(self) -> str:
        """Return the content of a ``tokenizer.json``."""
        text: str = self._engine.to_str(pretty=True)
        return text

    def save(self, path: Path | str) -> None:
        """Write a ``tokenizer.json``; whoever reads the path sees the old file or the whole new one."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(path)


def build_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Build a tokenizer that knows whole words only; everything else becomes ``[UNK]``.

    Args:
        words: The vocabulary or running text; every item is cleaned and split at spaces. Ids follow the
            alphabet, so equal sets of words give equal tokenizers.

    Raises:
        ValueError: There is no word.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import normalizers, pre_tokenizers
    from tokenizers.models import WordLevel

    known = sorted({word for item in words for word in clean(item).split()})
    if not known:
        raise ValueError("expected at least one word to build a vocabulary from")
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *known))}
    engine = Engine(WordLevel(vocabulary, unk_token=UNKNOWN))
    engine.normalizer = normalizers.Lowercase()
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(_finish(engine))


def _finish(engine: Any) -> Any:
    """Wrap texts as ``[CLS] text [SEP]`` and mark the special tokens as such."""
    from tokenizers import AddedToken, processors

    present = [token for token in SPECIAL if engine.token_to_id(token) is not None]
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in present])
    if CLASS in present and SEPARATOR in present:
        engine.post_processor = processors.TemplateProcessing(
            single=f"{CLASS} $A {SEPARATOR}",
            special_tokens=[(CLASS, engine.token_to_id(CLASS)), (SEPARATOR, engine.token_to_id(SEPARATOR))],
        )
    return engine
