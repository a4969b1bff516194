"""The filter of a search: a small expression over a video's properties, parsed, then bound as parameters.

Grammar: comparisons joined by `and`, `or`, `not` and parentheses. A comparison is `column = != < <= > >=
value`, `column [not] like 'pattern'` or `column [not] in (value, ...)`; a value is a number or a string in
single or double quotes, whose quote is doubled inside. Nothing of the text reaches the SQL statement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm.errors import InvalidInput

# what may be asked for, and how the catalogue computes it
COLUMNS = {
    "video_id": "video_id",
    "path": "CAST(path AS TEXT)",
    "size_bytes": "size_bytes",
    "duration_s": "duration_s",
    "width": "width",
    "height": "height",
    "codec": "codec",
    "num_segments": "num_segments",
}
_MAX_CHARACTERS = 2000
_MAX_DEPTH = 20
_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)|(?P<string>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")"
    r"|(?P<word>[A-Za-z_]\w*)|(?P<sign><=|>=|!=|<>|==|[=<>(),]))"
)
_SIGNS = {"=": "=", "==": "=", "!=": "<>", "<>": "<>", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition for a WHERE clause: fixed SQL with `?` in it, and the values to bind."""

    sql: str
    values: tuple[float | int | str, ...]


def parse_filter(text: str) -> Condition:
    """Parse a filter such as `duration_s > 60 and path like '%holiday%'`.

    Raises:
        InvalidInput: It is not such an expression; the message shows where it stops making sense.
    """
    if len(text) > _MAX_CHARACTERS:
        raise InvalidInput(f"the filter has {len(text)} characters, expected at most {_MAX_CHARACTERS}")
    check_text(text, "filter")
    return _Parser(text).parse()


def check_text(text: str, what: str) -> None:
    """Raise InvalidInput unless a text has a form in UTF-8; bytes of a command line may have none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"the {what} is not text in UTF-8: {ascii(text)}") from error


class _Parser:
    """Recursive descent over the tokens of one filter."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str, int]] = []
        self._next = 0
        self._values: list[float | int | str] = []
        position = 0
        end = len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error(position)
            kind = str(match.lastgroup)
            self._tokens.append((kind, match.group(kind), match.start(kind)))
            position = match.end()
        self._tokens.append(("end", "", end))

    def parse(self) -> Condition:
        sql = self._either(0)
        if self._peek()[0] != "end":
            raise self._error(self._peek()[2])
        return Condition(sql, tuple(self._values))

    def _either(self, depth: int) -> str:
        parts = [self._both(depth)]
        while self._accept_word("or"):
            parts.append(self._both(depth))
        return f"({' OR '.join(parts)})"

    def _both(self, depth: int) -> str:
        parts = [self._single(depth)]
        while self._accept_word("and"):
            parts.append(self._single(depth))
        return f"({' AND '.join(parts)})"

    def _single(self, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise InvalidInput(f"the filter is nested deeper than {_MAX_DEPTH} levels")
        if self._accept_word("not"):
            return f"(NOT {self._single(depth + 1)})"
        if self._accept_sign("("):
            inner = self._either(depth + 1)
            self._expect_sign(")")
            return inner
        return self._comparison()

    def _comparison(self) -> str:
        kind, word, position = self._take()
        column = COLUMNS.get(word.lower()) if kind == "word" else None
        if column is None:
            raise self._error(position, f"known columns: {', '.join(COLUMNS)}")
        negation = "NOT " if self._accept_word("not") else ""
        if self._accept_word("like"):
            return f"({column} {negation}LIKE {self._value()})"
        if self._accept_word("in"):
            self._expect_sign("(")
            values = [self._value()]
            while self._accept_sign(","):
                values.append(self._value())
            self._expect_sign(")")
            return f"({column} {negation}IN ({', '.join(values)}))"
        kind, sign, position = self._take()
        if negation or kind != "sign" or sign not in _SIGNS:
            raise self._error(position)
        return f"({column} {_SIGNS[sign]} {self._value()})"

    def _value(self) -> str:
        kind, word, position = self._take()
        if kind == "string":
            quote = word[0]
            self._values.append(word[1:-1].replace(quote * 2, quote))
        elif kind == "number":
            # SQLite's integers have 64 bits; a larger number is only ever compared, so a float serves
            whole = re.fullmatch(r"-?\d{1,18}", word)
            self._values.append(int(word) if whole else float(word))
        else:
            raise self._error(position, "a number or a quoted string belongs here")
        return "?"

    def _peek(self) -> tuple[str, str, int]:
        return self._tokens[self._next]

    def _take(self) -> tuple[str, str, int]:
        token = self._tokens[self._next]
        if token[0] == "end":
            raise self._error(token[2])
        self._next += 1
        return token

    def _accept_word(self, word: str) -> bool:
        kind, text, _ = self._peek()
        found = kind == "word" and text.lower() == word
        self._next += found
        return found

    def _accept_sign(self, sign: str) -> bool:
        found = self._peek()[:2] == ("sign", sign)
        self._next += found
        return found

    def _expect_sign(self, sign: str) -> None:
        if not self._accept_sign(sign):
            raise self._error(self._peek()[2], f"expected {sign!r}")

    def _error(self, position: int, hint: str = "expected for example: duration_s > 60") -> InvalidInput:
        rest = self._text[position : position + 30]
        where = f"at {rest!r}" if rest.strip() else "at its end"
        return InvalidInput(f"the filter {self._text[:100]!r} cannot be read {where}; {hint}")
