"""What modules a model holds, in its tree and besides: in lists, objects and functions that it reaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.models.parallel import forward_put_on, is_of_torch
from tdhook.models.reaching import Reached
from tdhook.tape.internals import FINDING_HOOKS, children_of

__all__ = ["Beside", "Makeup", "held_by", "modules_of"]

_CONTAINERS = (list, tuple, set, frozenset, dict)
_PLAIN = (bool, int, float, str, bytes, type)
_MOST = 64
# Parts of every module, which hold none that the model runs.
_OWN = frozenset(vars(nn.Module())) | {"forward", "_prev_forward", *FINDING_HOOKS}


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
        found += [module.training, forward_put_on(module)]
        found += [(name, _told(value)) for name, value in module.__dict__.items() if name not in _OWN]
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


class _Attributes:
    """What a module has besides its tree, in order to tell at a glance whether it still reaches the same modules.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._found = module, _held(module)
        self._note()

    def _note(self) -> None:
        attributes = self._module.__dict__
        self._count = len(attributes)
        own = [(name, value) for name, value in attributes.items() if name not in _OWN]
        self._plain = [name for name, value in own if type(value) in _LEADS_NOWHERE]
        self._others: list[tuple[str, Any, int | None]] = [
            (name, value, _size(value)) for name, value in own if type(value) not in _LEADS_NOWHERE
        ]

    def hold(self) -> bool:
        """Whether it does.

        Of a module that reached none, it is not seen that other values are in a container that is as large as before.
        """
        if not self._found and self._are_same():
            return True
        if _held(self._module) != self._found:
            return False
        self._note()
        return True

    def _are_same(self) -> bool:
        attributes = self._module.__dict__
        if len(attributes) != self._count:
            return False
        now = attributes.get
        for name in self._plain:
            if type(now(name)) not in _LEADS_NOWHERE:
                return False
        for name, value, size in self._others:
            if (size is not None and len(value) != size) or now(name) is not value:
                return False
        return True


_LEADS_NOWHERE = frozenset(
    (type(None), bool, int, float, complex, str, bytes, Tensor, torch.Size, torch.dtype)
)


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, _CONTAINERS) else None


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
        self._attributes = [_Attributes(m) for m in modules if not is_of_torch(m)]
        kinds = {type(m) for m in modules if not is_of_torch(m)}
        self._besides = [(kind, found) for kind in kinds if (found := [*Reached().of_class(kind)])]

    def holds(self) -> bool:
        """Whether the model consists of the same modules, of the same classes and under the same names."""
        for module, kind, forward, now, children in self._parts:
            if type(module) is not kind or ((now or children) and list(now.items()) != children):
                return False
            if module.__dict__.get("forward") is not forward and forward_put_on(module) is not forward:
                return False
        if not all(attributes.hold() for attributes in self._attributes):
            return False
        return all([*Reached().of_class(kind)] == found for kind, found in self._besides)
