"""Rules from plain data, by their names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from tdhook.relevance.propagation.rule import Rule

# Importing a rule makes it known by its name.
from tdhook.relevance.rules import (  # noqa: F401
    attention,
    epsilon,
    gradient,
    normalisation,
    products,
    recurrent,
    reveal,
    signed,
    simple,
    squares,
)

__all__ = ["rule_from_dict"]


def rule_from_dict(data: Mapping[str, object] | str) -> Rule:
    """Make a rule from plain data: ``{"rule": "EpsilonRule", "epsilon": 1e-3}``, or just its name.

    Raises:
        ValueError: no rule has that name, or it does not take these arguments.
    """
    arguments: dict[str, object] = {"rule": data} if isinstance(data, str) else dict(data)
    name = arguments.pop("rule", None)
    cls = Rule.registry.get(name) if isinstance(name, str) else None
    if cls is None or inspect.isabstract(cls):
        known = ", ".join(sorted(n for n, c in Rule.registry.items() if not inspect.isabstract(c)))
        raise ValueError(f"no rule is named {name!r}; rules are {known}")
    try:
        return cls(**arguments)
    except (
        TypeError,
        RuntimeError,
        OverflowError,
    ) as error:  # what torch says of bounds that are no numbers, too
        raise ValueError(f"{name} does not take {arguments}: {error}") from error
