"""The summary of an output folder: what a run wrote in ``summary.json``, as values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from tdhook.composites import Composite
from tdhook.files import read_json
from tdhook.rl.rollouts import Conservation

__all__ = ["Explained", "Told", "told_by"]

T = TypeVar("T")


@dataclass(frozen=True)
class Explained:
    """One explanation of a run.

    Attributes:
        of: its label.
        features: their names.
        actions: theirs.
    """

    of: str
    features: tuple[str, ...]
    actions: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """What a summary says.

    Attributes:
        tdhook: the version that wrote it.
        environment: its id.
        seed: of the run.
        target: what was explained, as text.
        composite_name: what the user called it.
        composite: the rules.
        method: the name of another method than LRP under a composite; ``None`` for that.
        baseline: what was compared with, as text; ``None`` where values were explained.
        account: of the relevance; ``None`` where none of it is conserved.
        explanations: at least one.
    """

    tdhook: str
    environment: str
    seed: int
    target: str
    composite_name: str
    composite: Composite
    method: str | None
    baseline: str | None
    account: Conservation | None
    explanations: tuple[Explained, ...]


def told_by(path: Path) -> Told:
    """Read a summary.

    Raises:
        ValueError: it is not as tdhook writes it. The message names the file and the place.
    """
    summary = read_json(path)
    try:
        composite = _entry(summary, "composite", _table)
        late = {"method": None, "baseline": None, **_entry({"": summary}, "", _table)}
        account = None if _entry(summary, "conservation", _anything) is None else _account(summary)
        return Told(
            tdhook=_entry(summary, "tdhook", _text),
            environment=_entry(summary, "environment", _text),
            seed=_entry(summary, "seed", _whole),
            target=_entry(summary, "target", _text),
            composite_name=_entry(composite, "name", _text, "composite."),
            composite=Composite.from_dict({"pairs": _entry(composite, "pairs", _list, "composite.")}),
            method=_entry(late, "method", _text),
            baseline=_entry(late, "baseline", _text),
            account=account,
            explanations=_explanations(summary),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not as tdhook writes it: {type(error).__name__}: {error}") from error


def _explanations(summary: object) -> tuple[Explained, ...]:
    parts = _entry(summary, "explanations", _list)
    if not parts:
        raise ValueError("'explanations' is empty")
    found = []
    for i, part in enumerate(parts):
        where = f"explanations[{i}]."
        features = _entry(part, "mean_relevance", _table, where)
        actions = _entry(part, "action_counts", _table, where)
        found.append(Explained(_entry(part, "of", _text, where), tuple(features), tuple(actions)))
    return tuple(found)


def _account(summary: object) -> Conservation:
    given = _entry(summary, "conservation", _table)
    values = {
        field.name: _entry(given, field.name, _number, "conservation.") for field in fields(Conservation)
    }
    return Conservation(**values)


def _entry(table: object, name: str, read: Callable[[object], T | None], within: str = "") -> T:
    """An entry of a table, if it is of its kind."""
    place = f"'{within}{name}'"
    if not isinstance(table, Mapping):
        raise ValueError(f"{within.rstrip('.') or 'it'} is no table")
    if name not in table:
        raise KeyError(within + name)
    value = read(table[name])
    if value is None and table[name] is not None:
        raise ValueError(f"{place} is {str(table[name])[:40]!r}, which it cannot be")
    return value  # type: ignore[return-value]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    return value if type(value) is int else None


def _number(value: object) -> float | None:
    if value is True or value is False or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _table(value: object) -> Mapping[str, object] | None:
    return value if isinstance(value, Mapping) else None


def _list(value: object) -> list[object] | None:
    return value if isinstance(value, list) else None


def _anything(value: object) -> object:
    return value
