"""Selectors: values that say which modules of a model are meant.

A selector is plain data. It is built up with ``&``, ``|`` and ``~``, printed, compared and written to a dictionary;
only a model's :class:`Site` tells whether it matches.

    Type(nn.Linear) & ~Name("head.*")
"""

from __future__ import annotations

import inspect
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from tensordict.utils import NestedKey, unravel_key
from torch import nn

from tdhook.attribution.lrp_helpers import types as families
from tdhook.operations.names import name_of
from tdhook.sites import Site

__all__ = [
    "First",
    "Last",
    "Name",
    "Op",
    "Reads",
    "Selector",
    "Site",
    "Type",
    "Where",
    "Writes",
    "as_selector",
]


class Selector(ABC):
    """What all selectors share: matching, and composition."""

    @abstractmethod
    def matches(self, site: Site) -> bool:
        """Whether the module at ``site`` is meant."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
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

    def __and__(self, other: SelectorLike) -> Selector:
        return _All((*_members(self, _All), *_members(as_selector(other), _All)))

    def __or__(self, other: SelectorLike) -> Selector:
        return _Any((*_members(self, _Any), *_members(as_selector(other), _Any)))

    def __invert__(self) -> Selector:
        return _Not(self)

    @staticmethod
    def from_dict(data: Any) -> Selector:
        """Make a selector from plain data (what :meth:`to_dict` gave; a string is a glob on the path).

        Classes are looked up by name among those already imported; nothing is imported or evaluated.

        Raises:
            ValueError: the data is not that of a selector.
        """
        if isinstance(data, str):
            return Name(data)
        kinds: list[Any] = list(data) if isinstance(data, Mapping) else []
        if len(kinds) != 1 or kinds[0] not in _READERS:
            raise ValueError(f"not a selector: {data!r}; expected one entry out of {', '.join(_READERS)}")
        try:
            return _READERS[kinds[0]](data[kinds[0]])
        except (KeyError, TypeError, re.error) as error:
            raise ValueError(f"not a selector: {data!r}: {error}") from error


SelectorLike: TypeAlias = (
    "Selector | type | tuple[type | str, ...] | str | re.Pattern[str] | Callable[..., object]"
)


def as_selector(value: SelectorLike) -> Selector:
    """The obvious selector: :class:`Type` for classes, :class:`Name` for a string, :class:`Where` for a callable."""
    if isinstance(value, Selector):
        return value
    if isinstance(value, type):
        return Type(value)
    if isinstance(value, tuple) and value and all(isinstance(v, type) for v in value):
        return Type(*value)
    if isinstance(value, str | re.Pattern):
        return Name(value)
    if callable(value):
        return Where(value)
    raise TypeError(
        f"{value!r} of type {type(value).__name__} selects nothing: give a selector, a class, a tuple of classes, a "
        "glob on the module path, or a predicate (name, module) -> bool"
    )


@dataclass(frozen=True, init=False)
class Type(Selector):
    """Modules of a class.

    Args:
        classes: classes, families of :mod:`tdhook.attribution.lrp_helpers.types`, or patterns of class names such as
            ``"*RMSNorm"`` (for classes that need not be imported; a base class counts, and the pattern may include the
            defining module: ``"transformers.*RMSNorm"``).
    """

    classes: tuple[type | str, ...]

    def __init__(self, *classes: type | str) -> None:
        if not classes or not all(isinstance(c, type | str) for c in classes):
            raise TypeError(f"Type takes classes or patterns of class names, got {classes!r}")
        object.__setattr__(self, "classes", classes)

    def matches(self, site: Site) -> bool:
        return any(
            _named(type(site.module), c) if isinstance(c, str) else isinstance(site.module, c)
            for c in self.classes
        )

    def to_dict(self) -> dict[str, Any]:
        return {"type": [c if isinstance(c, str) else _class_name(c) for c in self.classes]}

    def __repr__(self) -> str:
        return f"Type({', '.join(repr(c) if isinstance(c, str) else c.__name__ for c in self.classes)})"


def _named(cls: type, pattern: str) -> bool:
    return any(
        fnmatchcase(base.__name__, pattern) or fnmatchcase(f"{base.__module__}.{base.__qualname__}", pattern)
        for base in cls.__mro__[:-1]
    )


def _class_name(cls: type) -> str:
    if getattr(families, cls.__name__, None) is cls:
        return str(cls.__name__)
    if getattr(nn, cls.__name__, None) is cls:
        return f"nn.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _class_named(name: str) -> type | str:
    """The class that ``_class_name`` named, if its module is imported, or else the name as a pattern."""
    if name in families.__all__:
        return getattr(families, name)  # type: ignore[no-any-return]
    if name.startswith("nn."):
        found: Any = getattr(nn, name[3:], None)
        if not isinstance(found, type):
            raise ValueError(f"torch.nn has no class {name[3:]!r}")
        return found
    home, _, leaf = name.rpartition(".")
    found = getattr(sys.modules.get(home), leaf, None)
    return found if isinstance(found, type) else name


@dataclass(frozen=True, repr=False)
class Name(Selector):
    """Modules by dotted path.

    Args:
        pattern: a glob that the whole path matches (``*`` crosses dots: ``"*.layers.*"``), or a compiled regular
            expression that is searched in it.
    """

    pattern: str | re.Pattern[str]

    def matches(self, site: Site) -> bool:
        if not site.name:  # the model as a whole is meant only where it is named, not by "*"
            return self.pattern == ""
        if isinstance(self.pattern, str):
            return fnmatchcase(site.name, self.pattern)
        return self.pattern.search(site.name) is not None

    def to_dict(self) -> dict[str, Any]:
        if isinstance(self.pattern, str):
            return {"name": self.pattern}
        flags = re.RegexFlag(self.pattern.flags) & ~re.UNICODE
        return {
            "regex": {"pattern": self.pattern.pattern, "flags": int(flags)} if flags else self.pattern.pattern
        }

    def __repr__(self) -> str:
        return f"Name({self.pattern!r})"


@dataclass(frozen=True, init=False)
class Op(Selector):
    """Operations: torch functions that the forward pass calls outside of any module that has a rule itself.

    Functions, methods, operators, in-place and ``out=`` forms are one operation. Together with other selectors, those
    are about the module around it: ``Op(torch.add) & Name("*.layers.*")``.

    Args:
        operations: torch functions (``torch.add``, ``F.softmax``, ``operator.matmul``), or names or globs of names
            (``"softmax"``, ``"*pool2d"``).
    """

    operations: tuple[str, ...]

    def __init__(self, *operations: str | Callable[..., Any]) -> None:
        if not operations or not all(isinstance(o, str) or callable(o) for o in operations):
            raise TypeError(f"Op takes torch functions or names of operations, got {operations!r}")
        for operation in operations:
            if isinstance(operation, type):
                raise TypeError(
                    f"Op selects functions; write Type({operation.__name__}) for modules of a class"
                )
        object.__setattr__(self, "operations", tuple(map(name_of, operations)))

    @property
    def reaches_operations(self) -> bool:
        return True

    def matches(self, site: Site) -> bool:
        name = site.operation
        return name is not None and any(fnmatchcase(name, o) for o in self.operations)

    def to_dict(self) -> dict[str, Any]:
        return {"op": list(self.operations)}

    def __repr__(self) -> str:
        return f"Op({', '.join(map(repr, self.operations))})"


@dataclass(frozen=True, init=False, repr=False)
class _OfKey(Selector):
    key: NestedKey

    def __init__(self, key: NestedKey) -> None:
        object.__setattr__(self, "key", unravel_key(key))

    @property
    def needs_execution(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        key = self.key if isinstance(self.key, str) else list(self.key)
        return {type(self).__name__.lower(): key}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key!r})"


class Reads(_OfKey):
    """The layer that consumes a TensorDict key, so that each input modality can have its own first-layer rule.

    That is the first layer with a weight matrix that the key's value reaches inside the ``TensorDictModule`` that
    lists it among its ``in_keys``, or that module as a whole where it has none.
    """

    def matches(self, site: Site) -> bool:
        return self.key in site.keys_read.get(site.name, ())


class Writes(_OfKey):
    """The layer that produces a TensorDict key.

    That is the last layer with a weight matrix on the way to the key's value inside the ``TensorDictModule`` that
    lists it among its ``out_keys``, or that module as a whole where it has none.
    """

    def matches(self, site: Site) -> bool:
        return self.key in site.keys_written.get(site.name, ())


@dataclass(frozen=True, repr=False)
class _Extreme(Selector):
    selector: Selector

    def __post_init__(self) -> None:
        object.__setattr__(self, "selector", as_selector(self.selector))
        if self.selector.reaches_operations:
            raise TypeError(
                f"{type(self).__name__} chooses among modules, and {self.selector!r} selects operations"
            )

    @property
    def needs_execution(self) -> bool:
        return True

    def matches(self, site: Site) -> bool:
        if site.order is None:
            raise ValueError(
                f"{self!r} depends on the execution order of a whole model; give the composite to LRP(...) itself "
                "rather than calling it with one module"
            )
        for name in self._directed(site.order):
            if self.selector.matches(site.elsewhere(name)):
                return name == site.name
        return False

    def _directed(self, order: tuple[str, ...]) -> tuple[str, ...]:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return {type(self).__name__.lower(): self.selector.to_dict()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.selector!r})"


class First(_Extreme):
    """The first module, in execution order, that a selector matches."""

    def _directed(self, order: tuple[str, ...]) -> tuple[str, ...]:
        return order


class Last(_Extreme):
    """The last module, in execution order, that a selector matches."""

    def _directed(self, order: tuple[str, ...]) -> tuple[str, ...]:
        return order[::-1]


@dataclass(frozen=True)
class Where(Selector):
    """Modules for which a predicate holds.

    Args:
        predicate: ``(name, module) -> bool``, or ``(module) -> bool``.
    """

    predicate: Callable[..., object]

    def matches(self, site: Site) -> bool:
        try:
            signature = inspect.signature(self.predicate)
            signature.bind(site.name, site.module)
        except TypeError:
            return bool(self.predicate(site.module))
        except ValueError:  # a builtin without signature
            pass
        return bool(self.predicate(site.name, site.module))

    def to_dict(self) -> dict[str, Any]:
        raise TypeError(
            f"{self!r} holds a callable, which cannot be written as plain data; use Type, Name or Reads"
        )

    def __repr__(self) -> str:
        return f"Where({getattr(self.predicate, '__qualname__', repr(self.predicate))})"


@dataclass(frozen=True, repr=False)
class _Several(Selector):
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

    def _joined(self, symbol: str) -> str:
        return "(" + f" {symbol} ".join(map(repr, self.selectors)) + ")"


def _members(selector: Selector, kind: type[_Several]) -> tuple[Selector, ...]:
    """What ``a & b & c`` joins, in one list."""
    return selector.selectors if isinstance(selector, kind) else (selector,)


class _All(_Several):
    @property
    def depends_on_path(self) -> bool:
        mixed = self.reaches_operations and not all(s.reaches_operations for s in self.selectors)
        return mixed or super().depends_on_path

    def matches(self, site: Site) -> bool:
        if site.operation is not None:
            return all(
                s.matches(site) if s.reaches_operations else _holds(s, site.around()) for s in self.selectors
            )
        excluded = [s.selector for s in self.selectors if isinstance(s, _Not)]
        if len(excluded) == len(self.selectors):
            return all(s.matches(site) for s in self.selectors)
        wanted = (s for s in self.selectors if not isinstance(s, _Not))
        return all(s.matches(site) for s in wanted) and not any(s.matches(site) for s in excluded)

    def to_dict(self) -> dict[str, Any]:
        return {"all": [s.to_dict() for s in self.selectors]}

    def __repr__(self) -> str:
        return self._joined("&")


def _holds(selector: Selector, site: Site) -> bool:
    """Whether a selector matches the module around an operation, which need not be a layer."""
    return not selector.selector.matches(site) if isinstance(selector, _Not) else selector.matches(site)


class _Any(_Several):
    def matches(self, site: Site) -> bool:
        if site.operation is not None:
            return any(s.reaches_operations and s.matches(site) for s in self.selectors)
        return any(s.matches(site) for s in self.selectors)

    def to_dict(self) -> dict[str, Any]:
        return {"any": [s.to_dict() for s in self.selectors]}

    def __repr__(self) -> str:
        return self._joined("|")


@dataclass(frozen=True, repr=False)
class _Not(Selector):
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

    def matches(self, site: Site) -> bool:
        if self.reaches_operations:
            return site.operation is not None and not self.selector.matches(site)
        return not any(True for _ in site.module.children()) and not self.selector.matches(site)

    def to_dict(self) -> dict[str, Any]:
        return {"not": self.selector.to_dict()}

    def __repr__(self) -> str:
        return f"~{self.selector!r}"


def _read_type(value: Any) -> Selector:
    names = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("classes are given by name")
    return Type(*(_class_named(name) for name in names))


def _read_key(value: Any) -> NestedKey:
    parts = (value,) if isinstance(value, str) else tuple(value)
    if not parts or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"{value!r} is no key; a key is a string or a list of strings")
    return unravel_key(parts)


def _read_name(value: Any) -> Selector:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no glob")
    return Name(value)


def _read_regex(value: Any) -> Selector:
    given = value if isinstance(value, Mapping) else {"pattern": value}
    return Name(re.compile(given["pattern"], given.get("flags", 0)))


def _read_several(value: Any) -> tuple[Selector, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError(f"expected a list of selectors, got {value!r}")
    return tuple(map(Selector.from_dict, value))


_READERS: dict[str, Callable[[Any], Selector]] = {
    "type": _read_type,
    "name": _read_name,
    "regex": _read_regex,
    "op": lambda value: Op(*([value] if isinstance(value, str) else value)),
    "reads": lambda value: Reads(_read_key(value)),
    "writes": lambda value: Writes(_read_key(value)),
    "first": lambda value: First(Selector.from_dict(value)),
    "last": lambda value: Last(Selector.from_dict(value)),
    "all": lambda value: _All(_read_several(value)),
    "any": lambda value: _Any(_read_several(value)),
    "not": lambda value: _Not(Selector.from_dict(value)),
}
