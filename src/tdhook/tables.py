"""Tables: what TOML, JSON and words of the command line say, as plain data. Nothing is evaluated."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdhook.extras import require
from tdhook.plain import DEEPEST

__all__ = ["is_file", "parameters_in", "shortened", "table_in"]

# What opens and closes, and what hides it: text in quotes, and comments.
_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')
_TOML = re.compile(
    r'''"""(?:[^\\]|\\.)*?"""|'{3}.*?'{3}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*|[\[\]{}]''', re.DOTALL
)
# A word that no quotes are around, as a shell leaves it; what is in quotes, and the name of a value, are none.
_WORDS = re.compile(
    r"""(?P<quoted>"(?:[^"\\\n]|\\.)*"|'[^'\n]*')|(?P<word>[^\s,=\[\]{}"'#]+)(?P<named>\s*=)?"""
)
_LONGEST = 1000
"""Letters of an error that quotes what was read."""


def is_file(text: str) -> bool:
    """Whether text names a file, by its ending."""
    return Path(text).suffix.lower() in (".toml", ".json")


def table_in(path: Path) -> dict[str, Any]:
    """The table that a TOML or JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds none. The message names the file, and the place where that is known.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    kind = path.suffix[1:].upper()
    try:
        content = path.read_text(encoding="utf-8")
        data = _parse_toml(content) if kind == "TOML" else _parse_json(content)
    except ValueError as error:  # what all three decoders raise
        raise ValueError(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{path} holds no table, and a composite is one, with 'preset', 'pairs' or both, a method with 'method'"
        )
    return dict(data)


def parameters_in(what: str, text: str) -> dict[str, Any]:
    """The values of ``NAME=VALUE,...``, as in TOML, text with quotes or without.

    Raises:
        ValueError: it is not such. The message says of what, by ``what``.
    """
    try:
        table = _parse_toml(f"parameters = {{{_WORDS.sub(_in_quotes, text)}}}")
    except ValueError as error:
        raise ValueError(
            f"{what}: {shortened(repr(text))} are no parameters, which are NAME=VALUE with commas between them"
        ) from error
    found: dict[str, object] = table["parameters"]
    return found


def _in_quotes(found: re.Match[str]) -> str:
    """What was found as TOML has it: a word that is no number and no truth value is text."""
    word = found["word"]
    if word is None or found["named"] or _is_value(word):
        return found[0]
    return f"'{word}'"


def _is_value(word: str) -> bool:
    try:
        _parse_toml(f"value = {word}")
    except ValueError:
        return False
    return True


def _parse_json(text: str) -> object:
    _require_shallow(text, _JSON)
    found: object = json.loads(text, object_pairs_hook=_table)
    return found


def _table(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A table of JSON. TOML refuses a name that is there twice, too."""
    table: dict[str, object] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"a table has the name {name!r} twice")
        table[name] = value
    return table


def _require_shallow(text: str, tokens: re.Pattern[str]) -> None:
    """Refuse what is nested so deeply that a parser would give up without saying where."""
    depth = 0
    for token in tokens.finditer(text):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        if depth > 2 * DEEPEST:
            line, column = (
                text.count("\n", 0, token.start()) + 1,
                token.start() - text.rfind("\n", 0, token.start()),
            )
            raise ValueError(f"it is nested more than {2 * DEEPEST} deep at line {line}, column {column}")


def _parse_toml(text: str) -> dict[str, Any]:
    _require_shallow(text, _TOML)
    newer = sys.version_info >= (3, 11)
    parser = importlib.import_module("tomllib") if newer else require("tomli", "reading TOML on Python 3.10")
    data: dict[str, object] = parser.loads(text)
    return data


def shortened(text: str) -> str:
    """The text of an error, which may quote all that was read."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
