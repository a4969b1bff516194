"""Text on its way to a model: cleaning and tokenising."""

from vlm.text.cleaning import clean, join_statement
from vlm.text.tokenizer import Tokenizer, TruncationWarning, build_tokenizer
from vlm.text.vocabulary import bert_tokenizer

__all__ = ["Tokenizer", "TruncationWarning", "bert_tokenizer", "build_tokenizer", "clean", "join_statement"]
