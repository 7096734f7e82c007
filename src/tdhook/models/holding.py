"""What modules a model holds, in its tree and besides: in lists, objects and functions that it reaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tdhook.models.parallel import forward_put_on, is_of_torch
from tdhook.models.reaching import Reached
from tdhook.tape.internals import children_of

__all__ = ["Beside", "Makeup", "held_by", "modules_of"]

_CONTAINERS = (list, tuple, set, frozenset, dict)
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
        found += [attributes["training"], getattr(forward, "replaced", (forward,))[0]]
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


def _unregistered(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that a module reaches without registering them, by name."""
    return [*_held(module), *Reached().of_class(type(module))]


def _held(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those among them that it holds itself, and its class does not."""
    reached = Reached()
    found: list[tuple[str, nn.Module]] = []
    # A copy: another thread may put something on the module meanwhile.
    for name, value in list(vars(module).items()):
        if name not in _OWN and type(value) not in _PLAIN:
            found += reached.modules(name, value)
    return [*found, *reached.modules("forward", forward_put_on(module))]


class Makeup:
    """Of which modules a model consists, in order to tell whether that has changed.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = modules_of(root).values()
        self._parts = [
            (m, type(m), forward_put_on(m), children_of(m), list(children_of(m).items())) for m in modules
        ]
        self._held = [(m, _held(m)) for m in modules if not is_of_torch(m)]
        self._besides = [(m, found) for m in modules if (found := _unregistered(m))]

    def holds(self) -> bool:
        """Whether the model consists of the same modules, of the same classes and under the same names."""
        for module, kind, forward, now, children in self._parts:
            if type(module) is not kind or ((now or children) and list(now.items()) != children):
                return False
            if forward_put_on(module) is not forward:
                return False
        if any(_held(module) != found for module, found in self._held):
            return False
        return all(_unregistered(module) == found for module, found in self._besides)
