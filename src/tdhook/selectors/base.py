"""What all selectors share: matching, and composition."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from tdhook.models.sites import Site

__all__ = ["AllOf", "AnyOf", "NotThe", "Selector", "SelectorLike", "as_selector", "reads_data", "stands_for"]


class Selector(ABC):
    """What all selectors share: matching, and composition."""

    @abstractmethod
    def matches(self, site: Site) -> bool:
        """Whether the module at ``site`` is meant."""

    @abstractmethod
    def to_dict(self) -> dict[str, object]:
        """This selector as plain data."""

    @property
    def needs_execution(self) -> bool:
        """Whether matching depends on the order in which the model runs its modules."""
        return False

    @property
    def reaches_operations(self) -> bool:
        """Whether operations can be meant; else only modules are."""
        return False

    @property
    def depends_on_path(self) -> bool:
        """Whether it matters inside which module an operation is."""
        return False

    @property
    def orders_operations(self) -> bool:
        """Whether it matters when an operation is performed."""
        return False

    def inherited(self, site: Site) -> bool:
        """Whether the module at ``site``, which is meant, is so only as one of a class that its own derives from."""
        return False

    @property
    def anywhen(self) -> Selector:
        """What it would mean if it did not matter when an operation is performed: all that it may mean."""
        return self

    def __and__(self, other: SelectorLike) -> Selector:
        return AllOf((*members(self, AllOf), *members(as_selector(other), AllOf)))

    def __or__(self, other: SelectorLike) -> Selector:
        return AnyOf((*members(self, AnyOf), *members(as_selector(other), AnyOf)))

    def __invert__(self) -> Selector:
        return NotThe(self)

    @staticmethod
    def from_dict(data: object) -> Selector:
        """Make a selector from plain data (what :meth:`to_dict` gave; a string is a glob on the path).

        Classes are looked up by name among those already imported; nothing is imported or evaluated.

        Raises:
            ValueError: the data is not that of a selector.
        """
        found: Mapping[str, object] = data if isinstance(data, Mapping) else {}
        if isinstance(data, str):
            found = {"name": data}
        kinds = list(found)
        if len(kinds) != 1 or kinds[0] not in _READERS:
            raise ValueError(f"not a selector: {data!r}; expected one entry out of {', '.join(_READERS)}")
        try:
            return _READERS[kinds[0]](found[kinds[0]])
        except (KeyError, TypeError, OverflowError, RecursionError, re.error) as error:
            raise ValueError(f"not a selector: {data!r}: {error}") from error


SelectorLike: TypeAlias = (
    "Selector | type | tuple[type | str, ...] | str | re.Pattern[str] | Callable[..., object]"
)


def names_in(value: object) -> list[str]:
    """The names that plain data gives: one, or a list of them.

    Raises:
        TypeError: it is anything else.
    """
    listed: list[object] = (
        [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    )
    if not listed or not all(isinstance(name, str) for name in listed):
        raise TypeError(f"{value!r} is neither a name nor a list of names")
    return [str(name) for name in listed]


_READERS: dict[str, Callable[[object], Selector]] = {}
_OBVIOUS: list[tuple[Callable[[object], bool], Callable[[object], Selector]]] = []


def reads_data(kind: str) -> Callable[[Callable[[object], Selector]], Callable[[object], Selector]]:
    """Have a function read the selectors that are written as ``{kind: value}``."""

    def register(read: Callable[[object], Selector]) -> Callable[[object], Selector]:
        _READERS[kind] = read
        return read

    return register


def stands_for(fits: Callable[[object], bool], make: Callable[[Any], Selector]) -> None:
    """Have values that ``fits`` holds for stand for the selector that ``make`` makes of them."""
    _OBVIOUS.append((fits, make))


def as_selector(value: SelectorLike) -> Selector:
    """The obvious selector: ``Type`` for classes, ``Name`` for a string, ``Where`` for a callable.

    Raises:
        TypeError: there is none.
    """
    if isinstance(value, Selector):
        return value
    for fits, make in _OBVIOUS:
        if fits(value):
            return make(value)
    raise TypeError(
        f"{value!r} of type {type(value).__name__} selects nothing: give a selector, a class, a tuple of classes, a "
        "glob on the module path, or a predicate (name, module) -> bool"
    )


@dataclass(frozen=True, repr=False)
class Several(Selector):
    selectors: tuple[Selector, ...]

    @property
    def needs_execution(self) -> bool:
        return any(s.needs_execution for s in self.selectors)

    @property
    def reaches_operations(self) -> bool:
        return any(s.reaches_operations for s in self.selectors)

    @property
    def depends_on_path(self) -> bool:
        return any(s.depends_on_path for s in self.selectors)

    @property
    def orders_operations(self) -> bool:
        return any(s.orders_operations for s in self.selectors)

    @property
    def anywhen(self) -> Selector:
        return type(self)(tuple(s.anywhen for s in self.selectors))

    def _joined(self, symbol: str) -> str:
        return "(" + f" {symbol} ".join(map(repr, self.selectors)) + ")"


def members(selector: Selector, kind: type[Several]) -> tuple[Selector, ...]:
    """What ``a & b & c`` joins, in one list."""
    return selector.selectors if isinstance(selector, kind) else (selector,)


class AllOf(Several):
    """``a & b``. At an operation, what is said of modules is said of the one around it."""

    @property
    def depends_on_path(self) -> bool:
        mixed = self.reaches_operations and not all(s.reaches_operations for s in self.selectors)
        return mixed or super().depends_on_path

    def matches(self, site: Site) -> bool:
        if site.operation is not None:
            return all(
                s.matches(site) if s.reaches_operations else _holds(s, site.around()) for s in self.selectors
            )
        excluded = [s.selector for s in self.selectors if isinstance(s, NotThe)]
        if len(excluded) == len(self.selectors):
            return all(s.matches(site) for s in self.selectors)
        wanted = (s for s in self.selectors if not isinstance(s, NotThe))
        return all(s.matches(site) for s in wanted) and not any(s.matches(site) for s in excluded)

    def inherited(self, site: Site) -> bool:
        return any(s.inherited(site) for s in self.selectors)

    def to_dict(self) -> dict[str, object]:
        return {"all": [s.to_dict() for s in self.selectors]}

    def __repr__(self) -> str:
        return self._joined("&")


def _holds(selector: Selector, site: Site) -> bool:
    """Whether a selector matches the module around an operation, which need not be a layer."""
    return not selector.selector.matches(site) if isinstance(selector, NotThe) else selector.matches(site)


class AnyOf(Several):
    """``a | b``."""

    def matches(self, site: Site) -> bool:
        if site.operation is not None:
            return any(s.reaches_operations and s.matches(site) for s in self.selectors)
        return any(s.matches(site) for s in self.selectors)

    def inherited(self, site: Site) -> bool:
        return all(s.inherited(site) for s in self.selectors if s.matches(site))

    def to_dict(self) -> dict[str, object]:
        return {"any": [s.to_dict() for s in self.selectors]}

    def __repr__(self) -> str:
        return self._joined("|")


@dataclass(frozen=True, repr=False)
class NotThe(Selector):
    """What another selector leaves.

    On its own it means layers, not what merely contains them: ``~Type(nn.Linear)`` is not the whole model; and
    ``~Op("add")`` means operations.
    """

    selector: Selector

    @property
    def needs_execution(self) -> bool:
        return self.selector.needs_execution

    @property
    def reaches_operations(self) -> bool:
        return self.selector.reaches_operations

    @property
    def depends_on_path(self) -> bool:
        return self.selector.depends_on_path

    @property
    def orders_operations(self) -> bool:
        return self.selector.orders_operations

    @property
    def anywhen(self) -> Selector:
        return _AnyOperation() if self.orders_operations else self

    def matches(self, site: Site) -> bool:
        if self.reaches_operations:
            return site.operation is not None and not self.selector.matches(site)
        return not any(True for _ in site.module.children()) and not self.selector.matches(site)

    def to_dict(self) -> dict[str, object]:
        return {"not": self.selector.to_dict()}

    def __repr__(self) -> str:
        return f"~{self.selector!r}"


class _AnyOperation(Selector):
    """All operations."""

    def matches(self, site: Site) -> bool:
        return site.operation is not None

    def to_dict(self) -> dict[str, object]:
        return {"op": ["*"]}


def _several(value: object) -> tuple[Selector, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError(f"expected a list of selectors, got {value!r}")
    return tuple(map(Selector.from_dict, value))


_READERS["all"] = lambda value: AllOf(_several(value))
_READERS["any"] = lambda value: AnyOf(_several(value))
_READERS["not"] = lambda value: NotThe(Selector.from_dict(value))
