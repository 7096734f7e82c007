"""What is typed to begin a job, and to go on with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["Words"]


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "bool": (bool,),
    "int": (int,),
    "int | None": (int, type(None)),
    "tuple[str, ...]": (list, tuple),
}
"""What JSON has for each kind of word."""


@dataclass(frozen=True)
class Words:
    """All that decides what a job is, as ``tdhook dataset explain`` has it."""

    policy: str
    source: str
    composite: str = "epsilon_plus"
    method: str | None = None
    baseline: str | None = None
    target: str | None = None
    prepare: str | None = None
    rows: str | None = None
    keep: str = "all"
    reduce: str = "moments,histogram,top:6,sample:1000"
    by: str | None = None
    key: tuple[str, ...] = ()
    in_order: bool = False
    chunk: int | None = None
    seed: int = 0

    @classmethod
    def told(cls, told: Mapping[str, object]) -> Words:
        """The words that were noted when a job was begun.

        Raises:
            ValueError: some are missing, or are no such words.
        """
        names = [one.name for one in fields(cls)]
        missing = [name for name in names if name not in told]
        if missing:
            raise ValueError(
                f"words.json does not say {', '.join(missing)}: it is of another version of tdhook"
            )
        given = {name: told[name] for name in names}
        for one in fields(cls):
            if type(given[one.name]) not in _KINDS[str(one.type)]:
                raise ValueError(
                    f"words.json says {one.name} is {str(given[one.name])[:40]!r}, which it cannot be"
                )
        key: Any = given["key"]
        return cls(**{**given, "key": tuple(map(str, key))})  # type: ignore[arg-type]

    def command(self, out: Path) -> str:
        """What to type for the job in a folder."""
        given = ["tdhook", "dataset", "explain", "--out", str(out)]
        for one in fields(self):
            value, option = getattr(self, one.name), "--" + one.name.replace("_", "-")
            if one.default is not MISSING and value == one.default:
                continue
            for each in value if isinstance(value, tuple) else (value,):
                given += [option] if each is True else [option, str(each)]
        return shlex.join(given)
