"""Snapshots: all that the modules of a model hold besides the values of its parameters, to be put back later.

Looked into are the attributes of modules, the containers of Python (list, dict, set, deque, tuple) and TensorDicts that
they lead to, namespaces and queues, arrays, random generators, functions and hooks with what they close over, and
objects of classes that are the user's. Not looked into, and so not put back, are other objects of the standard library
and of the libraries in :data:`LEFT_ALONE` (a replay buffer, a file), iterators, global variables, attributes of classes
and what their methods close over, lazy modules that were not made yet, what a module registers as a hook while it runs,
and a parameter whose values are overwritten.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDict
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdhook.models.containers import of_array, of_bytes, of_function, of_sequence, of_set
from tdhook.models.generators import By, Held, drawn_by_others, drawn_by_torch, of_generator
from tdhook.tape.internals import FINDING_HOOKS, buffers_of, parameters_of, version_of
from tdhook.tape.sharded import is_sharded
from tdhook.tape.sparse import equal

__all__ = ["LEFT_ALONE", "Snapshot", "is_of_a_library"]

LEFT_ALONE = frozenset(
    (
        "torch",
        "torchrl",
        "tensordict",
        "tdhook",
        "numpy",
        "gym",
        "gymnasium",
        "ale_py",
        "transformers",
        "wandb",
    )
) | frozenset(sys.stdlib_module_names)
"""Top-level packages whose objects are not looked into, but for containers, tensors and generators."""

_HOLDING = frozenset(
    ("argparse", "collections", "queue", "transformers.cache_utils", "types", "weakref")
)  # modules of Python of these whose objects hold values, and are looked into nevertheless
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_MOST = 10_000  # of objects: beyond, a module has got hold of something that is not its state
_PLAIN = frozenset(
    (type(None), bool, int, float, complex, str, bytes, type, nn.Parameter)
)  # nothing to look into
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_FORWARD = ("forward", "_prev_forward")  # whose place rules take, and which is given back by whoever took it
_MACHINERY = (frozenset(vars(nn.Module())) - frozenset(_REGISTRIES)) | {*_FORWARD, *FINDING_HOOKS}


class _Entries:
    """A dictionary, in the order of its entries, but for some of them."""

    __slots__ = ("_before", "_held", "_kind", "_without")

    def __init__(self, held: dict[Any, object], without: frozenset[str] = frozenset()) -> None:
        self._kind: type[dict[Any, object]] = OrderedDict if isinstance(held, OrderedDict) else dict
        self._held, self._before, self._without = held, dict(self._kind.items(held)), without

    def values(self) -> list[object]:
        if not self._without:
            return list(self._before.values())
        return [value for name, value in self._before.items() if name not in self._without]

    def changed(self) -> bool:
        held, before = self._held, self._before
        same = len(held) == len(before) and all(
            a is b and held[a] is before[b] for a, b in zip(held, before, strict=True)
        )
        return not same and not self._is_as_before()

    def _is_as_before(self) -> bool:
        now, before = [*self._counting(self._held)], [*self._counting(self._before)]
        return now == before or (
            [name for name, _ in now] == [name for name, _ in before]
            and all(_is_lent(self._held[name], self._before[name]) for name, _ in {*now} - {*before})
        )

    def changed_besides(self, names: set[str]) -> bool:
        """Whether anything changed but the values of those entries."""
        now, before = dict(self._counting(self._held)), dict(self._counting(self._before))
        return now.keys() != before.keys() or any(
            now[name] != before[name] for name in now if name not in names
        )

    def _counting(self, entries: Mapping[object, object]) -> Iterator[tuple[object, int]]:
        return ((name, id(value)) for name, value in entries.items() if name not in self._without)

    def restore(self) -> None:
        held, without = self._held, self._without
        wanted = {
            name: held[name] if name in without or _is_lent(held.get(name), value) else value
            for name, value in self._before.items()
            if name not in without or name in held
        }
        wanted.update((name, value) for name, value in list(held.items()) if name in without)
        if list(held) != list(wanted):
            self._kind.clear(held)
        self._kind.update(held, wanted)


class Snapshot:
    """What some modules hold at this moment.

    Args:
        modules: the modules.
        alone: whether to leave out other modules that they lead to.
        torch_alone: whether to leave out random numbers that others than torch draw, which takes a while.
        without: tensors whose values are left out.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        alone: bool = False,
        torch_alone: bool = False,
        without: Iterable[Tensor] = (),
    ) -> None:
        modules = tuple(modules)
        self._wanted = frozenset(map(id, modules)) if alone else None
        self._first = modules[:1]
        self._buffers = frozenset(id(x) for module in modules for x in buffers_of(module).values())
        self._held: list[tuple[nn.Module, object, Held]] = []
        # What was seen is kept alive, lest something else come to have its id.
        self._seen: dict[int, object] = {id(x): x for x in without}
        traced = torch.compiler.is_compiling()
        self._drawn = [] if traced else list(drawn_by_torch())
        self._random = [*self._drawn, *([] if traced or torch_alone else drawn_by_others())]
        for module in modules:
            self._visit(module, module)

    @property
    def moved(self) -> tuple[nn.Module, ...]:
        """The modules that no longer hold what they held; random numbers that were drawn count as the first one's."""
        drawn = self._first if self.drew else ()
        owners = (owner for owner, _, held in self._held if held.changed())
        return tuple({id(owner): owner for owner in (*drawn, *owners)}.values())

    @property
    def drew(self) -> bool:
        """Whether random numbers were drawn that are shared by all."""
        return any(held.changed() for held in self._random)

    def moved_besides(self, slots: Iterable[tuple[Mapping[str, object], str]]) -> nn.Module | None:
        """A module that no longer holds what it held in anything but these entries and what torch draws, if any."""
        entries: dict[int, set[str]] = {}
        for registry, name in slots:
            entries.setdefault(id(registry), set()).add(name)
        tensors = {id(registry.get(name)) for registry, name in slots} | self._buffers
        if any(held.changed() for held in self._random if held not in self._drawn):
            return self._first[0]
        for owner, value, held in self._held:
            if isinstance(held, _Entries):
                of = value.__dict__ if isinstance(value, nn.Module) else value
                if held.changed_besides(entries.get(id(of), set())):
                    return owner
            elif id(value) not in tensors and held.changed():
                return owner
        return None

    def overwrote(self, tensor: Tensor) -> bool:
        """Whether a tensor that was held has other values than it had."""
        return any(value is tensor and held.changed() for _, value, held in self._held)

    def put_back(self) -> None:
        """Make everything what it was."""
        for drawn in self._random:
            drawn.restore()
        with torch.no_grad():
            for _, _, held in self._held:
                if held.changed():
                    held.restore()

    def _visit(self, owner: nn.Module, value: object) -> None:
        ahead = [(owner, value)]
        while ahead and len(self._seen) < _MOST:
            owner, value = ahead.pop()
            if id(value) in self._seen:
                continue
            if self._wanted is not None and isinstance(value, nn.Module) and id(value) not in self._wanted:
                continue
            if isinstance(value, Tensor) and _is_traced(value) and id(value) not in self._buffers:
                continue
            held, below = _look_into(value)
            if held is None and not below:
                continue
            self._seen[id(value)] = value
            if isinstance(value, _CONTAINERS) and hasattr(
                value, "__dict__"
            ):  # of a class that derives from one
                below = [*below, value.__dict__]
            owner = value if isinstance(value, nn.Module) else owner
            if held is not None:
                self._held.append((owner, value, held))
            ahead += [(owner, one) for one in below if type(one) not in _PLAIN]


def _is_lent(now: object, before: object) -> bool:
    """Whether a weight was gathered since, or given back (``fully_shard``), which is known to whoever did so alone."""
    return (
        isinstance(now, Tensor) and isinstance(before, Tensor) and is_sharded(now) is not is_sharded(before)
    )


def is_of_a_library(home: str) -> bool:
    """Whether a file of Python, by its name, is in one of :data:`LEFT_ALONE`, and has no code of users."""
    return home.partition(".")[0] in LEFT_ALONE


def _is_traced(value: Tensor) -> bool:
    """Whether it belongs to a graph that is being made, or was left behind by one, and has no values to look at."""
    return torch.compiler.is_compiling() or type(value).__module__.startswith("torch._subclasses.")


def _look_into(value: object) -> tuple[Held | None, Iterable[object]]:
    """How to put back what a value is, and the values in it."""
    kind = type(value)
    if kind is dict or kind is OrderedDict:  # most are
        return _dictionary(value)  # type: ignore[arg-type]
    if kind is set:
        return (of_set(value), list(value)) if value else (of_set(value), ())  # type: ignore[arg-type, call-overload]
    if isinstance(value, nn.Parameter):
        return None, ()
    if isinstance(value, nn.Module):
        if any(is_lazy(parameter) for parameter in parameters_of(value).values() if parameter is not None):
            return None, ()
        held = _Entries(value.__dict__, _MACHINERY)
        return held, [*held.values(), *_hooks(value)]
    if isinstance(value, Tensor):
        return _tensor(value), ()
    if isinstance(value, TensorDict):
        return _below(_Entries(value._tensordict))
    if isinstance(value, LazyStackedTensorDict):
        return _stack(value), list(value.tensordicts)
    if isinstance(value, dict):
        return _dictionary(value)
    if isinstance(value, list | deque):
        return of_sequence(value), list(value)
    if isinstance(value, set):
        return of_set(value), list(value)
    if isinstance(value, tuple):
        return None, [*tuple.__iter__(value)]
    if isinstance(value, frozenset):
        return None, value
    generator = of_generator(value)
    if generator is not None:
        return generator, ()
    if type(value).__module__ == "numpy" and hasattr(value, "flat"):
        return of_array(value)
    if isinstance(value, FunctionType):
        return of_function(value)
    if isinstance(value, MethodType | BuiltinMethodType):
        return None, (value.__self__, getattr(value, "__func__", None))
    if isinstance(value, partial):
        return None, (value.func, value.args, value.keywords)
    if isinstance(value, bytearray | array):
        return of_bytes(value), ()
    module = type(value).__module__
    if (is_of_a_library(module) and module not in _HOLDING) or not _is_plain(value):
        return None, ()
    return _object(value)


def _hooks(module: nn.Module) -> list[object]:
    """The hooks of the user's that run with a module: they may remember, too."""
    hooks = [hook for name in _HOOKS for hook in module.__dict__.get(name, {}).values()]
    functions = [getattr(hook, "func", hook) for hook in hooks]
    return [
        hook
        for hook, function in zip(hooks, functions, strict=True)
        if not is_of_a_library(getattr(function, "__module__", None) or "")
    ]


def _dictionary(value: dict[Any, object]) -> tuple[Held, list[object]]:
    held = _Entries(value)
    return held, [*value, *held.values()]


def _below(held: _Entries) -> tuple[Held, list[object]]:
    return held, held.values()


def _is_plain(value: object) -> bool:
    return not callable(getattr(type(value), "__get__", None)) and not hasattr(type(value), "__next__")


def _stack(value: LazyStackedTensorDict) -> Held:
    """A lazy stack, to which elements are added."""
    elements, size = of_sequence(value.tensordicts), value.batch_size

    def restore() -> None:
        elements.restore()
        value._batch_size = size

    return By(elements.changed, restore)


def _object(value: object) -> tuple[Held | None, list[object]]:
    """An object of the user's: its attributes, in a dictionary or in slots."""
    inside = getattr(value, "__dict__", None)
    held = _Entries(inside) if isinstance(inside, dict) else None
    names = [name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))]
    slots = [name for name in names if name not in ("__dict__", "__weakref__")]
    if not slots:
        return (None, []) if held is None else _below(held)
    absent = object()
    before = {name: getattr(value, name, absent) for name in slots}

    def changed() -> bool:
        outside = any(getattr(value, name, absent) is not old for name, old in before.items())
        return outside or (held is not None and held.changed())

    def restore() -> None:
        for name, old in before.items():
            if old is not absent:
                object.__setattr__(value, name, old)
            elif hasattr(value, name):
                object.__delattr__(value, name)
        if held is not None:
            held.restore()

    found = [old for old in before.values() if old is not absent]
    return By(changed, restore), [*found, *(() if held is None else held.values())]


def _names(slots: str | Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _tensor(value: Tensor) -> Held:
    """A tensor that may be overwritten."""
    before = value.detach().clone()
    looked_at = not torch.compiler.is_compiling() and value.device.type != "meta"
    version = None if value.is_inference() else version_of(value)

    def changed() -> bool:
        if _shape(value) != _shape(before) or (version is not None and version_of(value) != version):
            return True
        # Writes through `.data`, of numpy, and of layers in a graph that is traced raise no version.
        return not equal(value.detach(), before) if looked_at else torch.compiler.is_compiling()

    def restore() -> None:
        if _shape(value) != _shape(before):
            value.data = before
            return
        # Out of inference mode gradients are on, which a leaf that requires one must not be overwritten under.
        with torch.inference_mode(value.is_inference()), torch.no_grad():
            value.copy_(before)

    return By(changed, restore)


def _shape(x: Tensor) -> torch.Size | None:
    return None if x.is_nested else x.shape
