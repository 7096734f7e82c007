"""What modules a model holds, in its tree and besides: in lists, in functions that it calls, in attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from tdhook.tape.internals import children_of

__all__ = ["Beside", "Makeup", "held_by", "modules_of"]

_CONTAINERS = (list, tuple, set, frozenset, dict)
_FUNCTIONS = (FunctionType, MethodType, partial)
_PLAIN = (bool, int, float, str, bytes, type)
_MOST = 64
# Parts of every module, which hold none that the model runs.
_OWN = frozenset(vars(nn.Module())) | {"forward", "_prev_forward"}


class Beside(nn.Module):
    """Modules that a model has besides its own, under paths among these.

    As a child of the model it is what ``state_dict``, ``to`` and ``train`` go through.

    Args:
        modules: by dotted path, relative to the model.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        names: dict[str, dict[str, nn.Module]] = {}
        for path, module in modules.items():
            name, _, below = path.partition(".")
            names.setdefault(name, {})[below] = module
        for name, inside in names.items():
            self.add_module(name, inside[""] if "" in inside else Beside(inside))


def held_by(modules: Iterable[nn.Module]) -> list[object]:
    """What modules hold besides tensors and modules, and how they compute, to compare with what they hold later."""
    found: list[object] = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
    ]
    for module in modules:
        attributes = module.__dict__
        forward = attributes.get("forward")
        found += [module.training, getattr(forward, "replaced", (forward,))[0]]
        found += [(name, _told(value)) for name, value in attributes.items() if name not in _OWN]
    return found


def _told(value: object, depth: int = 3) -> object:
    """A value so that it does not change with what it holds; by itself where it is no plain one."""
    if isinstance(value, _PLAIN) or value is None:
        return type(value), value
    if depth and type(value) in _CONTAINERS and len(value) <= _MOST:  # type: ignore[arg-type]
        inside = value.items() if isinstance(value, dict) else value
        return type(value), [_told(x, depth - 1) for x in inside]  # type: ignore[attr-defined]
    return Tensor if isinstance(value, Tensor) else _Itself(value)


class _Itself:
    """A value that is the same as itself alone."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def modules_of(root: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by dotted path, those included that it holds without registering them.

    torchrl's multi-agent networks run such a module, with parameters that are kept elsewhere; a function that a
    TensorDictModule wraps may call others, which are named as it names them. What a model has :class:`Beside` its own
    modules is under the paths that it has there.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(prefix: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        is_beside = isinstance(module, Beside)
        if not is_beside:
            found[prefix] = module
        for name, child in (*children_of(module).items(), *_unregistered(module)):
            if isinstance(child, Beside) and not is_beside:
                visit(prefix, child)
            elif child is not None:
                visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", root)
    return found


def _unregistered(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a module holds without registering them, by name."""
    seen: set[int] = set()
    # A copy: another thread may put something on the module meanwhile.
    for name, value in list(vars(module).items()):
        if name not in _OWN:
            yield from _inside(name, value, seen)


def _inside(name: str, value: object, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, _CONTAINERS):
        if id(value) not in seen:
            seen.add(id(value))
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            for key, below in list(entries):
                yield from _inside(f"{name}.{key}", below, seen)
    elif isinstance(value, _FUNCTIONS) and id(value) not in seen:
        seen.add(id(value))
        for key, below in _referred_to(value):
            yield from _inside(f"{name}.{key}", below, seen)


def _referred_to(function: Callable[..., object]) -> Iterable[tuple[str, object]]:
    """What a function calls, as far as it can be seen from outside, by the names that it has there."""
    if isinstance(function, partial):
        return [
            ("func", function.func),
            *_numbered(function.args),
            *function.keywords.items(),
        ]
    if isinstance(function, MethodType):
        return [("self", function.__self__)] if isinstance(function.__self__, nn.Module) else []
    if not isinstance(function, FunctionType):
        return []
    code = function.__code__
    found: list[tuple[str, object]] = []
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # nothing was assigned yet
            continue
    known = function.__globals__
    found += [(name, known[name]) for name in code.co_names if isinstance(known.get(name), nn.Module)]
    return [*found, *_numbered(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]


def _numbered(values: Iterable[object]) -> Iterator[tuple[str, object]]:
    """Values by their number, in words."""
    return ((str(i), value) for i, value in enumerate(values))


class Makeup:
    """Of which modules a model consists, in order to tell whether that has changed.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = modules_of(root).values()
        self._parts = [(m, type(m), children_of(m), list(children_of(m).items())) for m in modules]
        self._besides = [(m, found) for m in modules if (found := list(_unregistered(m)))]

    def holds(self) -> bool:
        """Whether the model consists of the same modules, of the same classes and under the same names."""
        for module, kind, now, children in self._parts:
            if type(module) is not kind or ((now or children) and list(now.items()) != children):
                return False
        return all(list(_unregistered(module)) == found for module, found in self._besides)
