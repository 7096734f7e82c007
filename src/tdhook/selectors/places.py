"""Selectors of modules: by class, path, key, order, or a predicate."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from tensordict.utils import NestedKey, unravel_key
from torch import nn

from tdhook.models import families
from tdhook.models.parallel import forward_put_on
from tdhook.models.sites import Site
from tdhook.selectors.base import Selector, as_selector, names_in, reads_data, stands_for

__all__ = ["First", "Last", "Name", "Reads", "Type", "Where", "Writes"]

T = TypeVar("T")


@dataclass(frozen=True, init=False)
class Type(Selector):
    """Modules of a class.

    Args:
        classes: classes, families of :mod:`tdhook.models.families`, or patterns of class names such as
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

    def inherited(self, site: Site) -> bool:
        cls = type(site.module)
        own = any(_names(cls, c) if isinstance(c, str) else c is cls for c in self.classes)
        return not own or forward_put_on(site.module) is not None

    def to_dict(self) -> dict[str, object]:
        return {"type": [c if isinstance(c, str) else _class_name(c) for c in self.classes]}

    def __repr__(self) -> str:
        return f"Type({', '.join(repr(c) if isinstance(c, str) else c.__name__ for c in self.classes)})"


def _named(cls: type, pattern: str) -> bool:
    return any(_names(base, pattern) for base in cls.__mro__[:-1])


def _names(cls: type, pattern: str) -> bool:
    return fnmatchcase(cls.__name__, pattern) or fnmatchcase(f"{cls.__module__}.{cls.__qualname__}", pattern)


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
        found: object = getattr(nn, name[3:], None)
        if not isinstance(found, type):
            raise ValueError(f"torch.nn has no class {name[3:]!r}")
        return found
    home, _, leaf = name.rpartition(".")
    # Not getattr: a module may import what it is asked for.
    found = vars(sys.modules[home]).get(leaf) if home in sys.modules else None
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

    def to_dict(self) -> dict[str, object]:
        if isinstance(self.pattern, str):
            return {"name": self.pattern}
        flags = re.RegexFlag(self.pattern.flags) & ~re.UNICODE
        return {
            "regex": {"pattern": self.pattern.pattern, "flags": int(flags)} if flags else self.pattern.pattern
        }

    def __repr__(self) -> str:
        return f"Name({self.pattern!r})"


@dataclass(frozen=True, init=False, repr=False)
class _OfKey(Selector):
    key: NestedKey

    def __init__(self, key: NestedKey) -> None:
        object.__setattr__(self, "key", unravel_key(key))

    @property
    def needs_execution(self) -> bool:
        return True

    def to_dict(self) -> dict[str, object]:
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

    @property
    def needs_execution(self) -> bool:
        return True

    @property
    def reaches_operations(self) -> bool:
        return self.selector.reaches_operations

    @property
    def depends_on_path(self) -> bool:
        return self.reaches_operations

    @property
    def orders_operations(self) -> bool:
        return self.reaches_operations

    @property
    def anywhen(self) -> Selector:
        return self.selector.anywhen if self.reaches_operations else self

    def matches(self, site: Site) -> bool:
        if site.order is None and site.performed is None:
            raise ValueError(
                f"{self!r} depends on the execution order of a whole model; give the composite to LRP(...) itself "
                "rather than calling it with one module"
            )
        if self.reaches_operations:
            if site.operation is None:
                return False
            for one in self._directed(site.performed or ()):
                if self.selector.matches(site.another(one)):
                    return one == site.performance
            return False
        for name in self._directed(site.order or ()):
            if self.selector.matches(site.elsewhere(name)):
                return name == site.name
        return False

    def _directed(self, order: tuple[T, ...]) -> tuple[T, ...]:
        raise NotImplementedError

    def inherited(self, site: Site) -> bool:
        return self.selector.inherited(site)

    def to_dict(self) -> dict[str, object]:
        return {type(self).__name__.lower(): self.selector.to_dict()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.selector!r})"


class First(_Extreme):
    """The first module, in execution order, that a selector matches; or, of operations, the first of these."""

    def _directed(self, order: tuple[T, ...]) -> tuple[T, ...]:
        return order


class Last(_Extreme):
    """The last module, in execution order, that a selector matches; or, of operations, the last of these."""

    def _directed(self, order: tuple[T, ...]) -> tuple[T, ...]:
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

    def to_dict(self) -> dict[str, object]:
        raise TypeError(
            f"{self!r} holds a callable, which cannot be written as plain data; use Type, Name or Reads"
        )

    def __repr__(self) -> str:
        return f"Where({getattr(self.predicate, '__qualname__', repr(self.predicate))})"


@reads_data("type")
def _read_type(value: object) -> Selector:
    return Type(*(_class_named(name) for name in names_in(value)))


@reads_data("name")
def _read_name(value: object) -> Selector:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no glob")
    return Name(value)


@reads_data("regex")
def _read_regex(value: object) -> Selector:
    given: Mapping[object, object] = value if isinstance(value, Mapping) else {"pattern": value}
    pattern, flags = given["pattern"], given.get("flags", 0)
    if not isinstance(pattern, str) or not isinstance(flags, int) or set(given) - {"pattern", "flags"}:
        raise TypeError("a regular expression is a string, or a table of 'pattern' and 'flags'")
    return Name(re.compile(pattern, flags))


def _read_key(value: object) -> NestedKey:
    return unravel_key(tuple(names_in(value)))


reads_data("reads")(lambda value: Reads(_read_key(value)))
reads_data("writes")(lambda value: Writes(_read_key(value)))
reads_data("first")(lambda value: First(Selector.from_dict(value)))
reads_data("last")(lambda value: Last(Selector.from_dict(value)))

stands_for(lambda value: isinstance(value, type), Type)
stands_for(
    lambda value: isinstance(value, tuple) and bool(value) and all(isinstance(v, type) for v in value),
    lambda value: Type(*value),
)
stands_for(lambda value: isinstance(value, str | re.Pattern), Name)
stands_for(callable, Where)
