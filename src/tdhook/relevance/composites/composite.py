"""Composites: ordered lists of ``(selector, rule)``, first match wins; and the presets, which are such lists.

``[(Reads("pixels"), FlatRule())] + epsilon_plus()`` is a preset with another rule for the layer that reads the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn

from tdhook.models.sites import Site
from tdhook.plain import require_plain
from tdhook.relevance.propagation.rule import Rule
from tdhook.relevance.rules.data import rule_from_dict
from tdhook.selectors import Selector, SelectorLike, Where, as_selector

__all__ = ["PRESETS", "Composite", "Pairs", "RuleMapper", "preset"]

RuleMapper: TypeAlias = "Callable[[str, nn.Module], Rule | None]"
Pairs: TypeAlias = "Iterable[tuple[SelectorLike, Rule]]"
Entry: TypeAlias = "tuple[Selector, Rule] | tuple[Selector, RuleMapper]"


class Composite:
    """An ordered list of ``(selector, rule)`` pairs, of which the first match wins.

    It is a value: printed, compared, concatenated with ``+``, written to plain data. It is also a rule mapper,
    ``composite(name, module) -> Rule or None``.

    A subclass may decide on modules in its own way by overriding that call.

    Args:
        pairs: the list; what is not a selector stands for the obvious one (see
            :func:`tdhook.selectors.as_selector`).

    Attributes:
        entries: the pairs, and, where a user's mapper is asked in between, the mapper in place of a rule.

    Raises:
        TypeError: a pair is not one of a selector and a rule.
    """

    def __init__(self, pairs: Pairs = ()) -> None:
        self.entries: tuple[Entry, ...] = _entries_of(pairs)

    @property
    def pairs(self) -> tuple[tuple[Selector, Rule], ...]:
        """The pairs of a selector and a rule."""
        return tuple((selector, rule) for selector, rule in self.entries if isinstance(rule, Rule))

    def find(self, site: Site) -> tuple[Selector, Rule] | None:
        """The first pair whose selector matches ``site``, or the rule that a subclass or a mapper says."""
        if site.operation is None and self.decides_itself:
            rule = self(site.name, site.module)
            return None if rule is None else (Where(self), rule)
        return _first(self.entries, site)

    @property
    def decides_itself(self) -> bool:
        """Whether a subclass has its own way to decide on modules."""
        return type(self).__call__ is not Composite.__call__

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule for one module, seen without the model around it.

        Raises:
            ValueError: a selector depends on the execution order of a whole model.
        """
        return self._rule_for(self.entries, name, module)

    @staticmethod
    def _rule_for(entries: Iterable[Entry], name: str, module: nn.Module) -> Rule | None:
        pair = _first(entries, Site(name, module))
        return None if pair is None else pair[1]

    @property
    def needs_execution(self) -> bool:
        """Whether matching depends on the order in which the model runs its modules."""
        return any(selector.needs_execution for selector, _ in self.pairs)

    @property
    def on_operations(self) -> tuple[tuple[Selector, Rule], ...]:
        """The pairs that can mean operations."""
        return tuple(pair for pair in self.pairs if pair[0].reaches_operations)

    def __add__(self, other: Composite | Pairs) -> Composite:
        joined = Composite()
        joined.entries = (*_entries_of(self), *_entries_of(other))
        return joined

    def __radd__(self, other: Pairs) -> Composite:
        return Composite(other) + self

    def __iter__(self) -> Iterator[tuple[Selector, Rule]]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __eq__(self, other: object) -> bool:
        return self.entries == other.entries if isinstance(other, Composite) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.entries)

    def __repr__(self) -> str:
        lines = "".join(f"\n    ({selector!r}, {rule!r})," for selector, rule in self.entries)
        return f"{type(self).__name__}([{lines}\n])" if lines else f"{type(self).__name__}([])"

    def to_dict(self) -> dict[str, Any]:
        """This composite as plain data, fit for TOML and JSON.

        Raises:
            TypeError: it holds a callable, which is not data.
        """
        for _, rule in self.entries:
            if not isinstance(rule, Rule):
                raise TypeError(
                    f"the composite asks {rule!r}, a callable, which cannot be written as plain data"
                )
        return {"pairs": [{"select": selector.to_dict(), **rule.to_dict()} for selector, rule in self.pairs]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Composite:
        """Make a composite from plain data: ``{"pairs": [{"select": ..., "rule": ..., **arguments}]}``.

        ``{"preset": name, **parameters}`` stands for a preset; with ``pairs`` beside it, these come first.

        Raises:
            ValueError: the data is not that of a composite.
        """
        require_plain(data)
        content = dict(data)
        pairs = content.pop("pairs", [])
        name = content.pop("preset", None)
        if name is None and (content or "pairs" not in data):
            raise ValueError(
                f"a composite is given by 'pairs', 'preset' or both; got {sorted(map(str, data))}"
            )
        if not isinstance(pairs, list | tuple):
            raise ValueError(f"'pairs' is a list, and each of 'pairs' has 'select' and 'rule'; got {pairs!r}")
        if name is not None and not isinstance(name, str):
            raise ValueError(f"'preset' is the name of one, got {name!r}")
        own = []
        for i, entry in enumerate(pairs):
            if not isinstance(entry, Mapping) or "select" not in entry or "rule" not in entry:
                raise ValueError(f"pairs[{i}]: each of 'pairs' has 'select' and 'rule', got {entry!r}")
            rule = {key: value for key, value in entry.items() if key != "select"}
            try:
                own.append((Selector.from_dict(entry["select"]), rule_from_dict(rule)))
            except ValueError as error:
                raise ValueError(f"pairs[{i}]: {error}") from error
        return Composite(own) if name is None else own + preset(name, **content)


def _first(entries: Iterable[Entry], site: Site) -> tuple[Selector, Rule] | None:
    for selector, rule in entries:
        if site.operation is not None and not selector.reaches_operations:
            continue
        if not isinstance(rule, Rule):
            found = rule(site.name, site.module)
            if found is not None:
                return selector, found
        elif selector.matches(site):
            return selector, rule
    return None


def _entries_of(pairs: Composite | Pairs) -> tuple[Entry, ...]:
    if not isinstance(pairs, Composite):
        return tuple(_as_pair(pair) for pair in pairs)
    return ((Where(pairs), pairs),) if pairs.decides_itself else pairs.entries


def _as_pair(pair: object) -> tuple[Selector, Rule]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"a composite is a list of (selector, rule) pairs, got {pair!r}")
    selector, rule = pair
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise TypeError(f"a composite pairs selectors with rules: write {rule.__name__}(...), not the class")
    if not isinstance(rule, Rule):
        raise TypeError(f"a composite pairs selectors with rules, got {rule!r} of type {type(rule).__name__}")
    return as_selector(selector), rule


PRESETS: dict[str, Callable[..., Composite]] = {}
"""Presets by name; :mod:`tdhook.relevance.composites.presets` fills it."""


def preset(name: str, **parameters: object) -> Composite:
    """The preset of that name: ``preset("epsilon_gamma_box", low=0.0, high=1.0)``.

    Raises:
        ValueError: no preset has that name, or it does not take these parameters.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is named {name!r}; presets are {', '.join(PRESETS)}")
    try:
        return PRESETS[name](**parameters)
    except (
        TypeError,
        RuntimeError,
        OverflowError,
    ) as error:  # what torch says of bounds that are no numbers, too
        raise ValueError(f"preset {name!r}: {error}") from error
