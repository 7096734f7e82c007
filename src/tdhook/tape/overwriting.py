"""Operations that overwrite their argument: what the backward pass still needs is copied before it is overwritten."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdhook.tape.functions import apart, copying
from tdhook.tape.internals import (
    children_of,
    inside,
    is_plain,
    is_wrapped,
    storage_of,
    transformed,
    version_of,
)
from tdhook.tape.undoing import undone

__all__ = [
    "Constants",
    "Guard",
    "Memory",
    "Mutated",
    "Outdated",
    "natively",
    "out_of_place",
    "overwrites",
    "version_in",
    "was_overwritten",
]


class Mutated(BaseException):
    """An operation is about to overwrite a tensor while nothing guards what the backward pass kept.

    The model is run again, guarded. Not an ``Exception``, so that the model's own handlers let it pass.
    """


class _Kept:
    """A tensor that the backward pass needs."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Guard:
    """Copies what the backward pass keeps of a tensor before the tensor is overwritten.

    The first operation that overwrites something raises :class:`Mutated`; from then on this guards.
    """

    def __init__(self) -> None:
        self.active = False
        self._kept: dict[int, weakref.WeakSet[_Kept]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"active": self.active, "_kept": {}}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Guard one forward pass, since one before it has shown the need."""
        self._kept = {}
        with copying(), torch.autograd.graph.saved_tensors_hooks(self._keep, _give_back):
            yield
        self._kept = {}

    def before(self, target: Any) -> None:
        """Copy what is kept of ``target``, which is about to be overwritten."""
        if not self.active:
            self.active = True
            raise Mutated
        for kept in self._kept.pop(storage_of(target), ()):
            kept.tensor = kept.tensor.clone()

    def _keep(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor.detach())
        self._kept.setdefault(storage_of(tensor), weakref.WeakSet()).add(kept)
        return kept


class Memory:
    """Where tensors lie that were told of, as long as that memory is in use."""

    def __init__(self) -> None:
        self._places: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_places": {}}

    def __bool__(self) -> bool:
        return bool(self._places)

    def clear(self) -> None:
        """Forget all of them."""
        self._places.clear()

    def add(self, tensor: Tensor) -> None:
        """Remember a tensor."""
        places, place = self._places, storage_of(tensor)
        while is_wrapped(tensor):
            tensor = inside(tensor)
        # No function of Python's, in which an interrupt would be lost; what it is called with is the default of `pop`.
        places[place] = weakref.ref(tensor.untyped_storage(), partial(places.pop, place))

    def holds(self, tensor: object) -> bool:
        """Whether a tensor lies where one of them does."""
        if not self._places or not isinstance(tensor, Tensor) or not is_plain(tensor):
            return False
        return storage_of(tensor) in self._places


class Outdated:
    """Tensors that are no longer, or not yet, what the tape says of them.

    A layer with ``inplace=True`` would have overwritten one, had it not been run out of place. Mostly nobody reads it
    again, nor what shares its memory, and nothing is to be copied. Where it is read, or kept, the model is run again,
    guarded, and such layers overwrite what they are given.

    Or the model itself has overwritten one off the tape. Nothing can be said of what it computes with that.

    Args:
        guard: guards the run in which layers overwrite.

    Attributes:
        layers: ids of the layers.
        heeded: whether they overwrite.
        any: whether there are any such tensors.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self.layers: set[int] = set()
        self.heeded = self.any = False
        self._memory, self._hidden = Memory(), Memory()
        self._told = ""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "layers": set()}

    def clear(self) -> None:
        """Begin a forward pass."""
        self.any = False
        self._memory.clear()
        self._hidden.clear()

    def add(self, tensor: Tensor) -> None:
        """Remember a tensor that should have been overwritten."""
        self.any = True
        self._memory.add(tensor)

    def hide(self, tensor: Tensor, told: str) -> None:
        """Remember a tensor that was overwritten off the tape, and what to tell whoever reads it."""
        self.any, self._told = True, told
        self._hidden.add(tensor)

    def check(self, values: Iterable[object], *, kept: bool = False) -> None:
        """Have the model run again if one of the values should have been overwritten.

        Args:
            values: what is read.
            kept: whether it is merely kept.

        Raises:
            NotImplementedError: a value that is read was overwritten off the tape.
        """
        for value in values:
            if isinstance(value, Tensor):
                if self._memory.holds(value):
                    self.heeded = self._guard.active = True
                    raise Mutated
                if not kept and value.requires_grad and self._hidden.holds(value):
                    raise NotImplementedError(self._told)
            elif isinstance(value, list | tuple):
                self.check(value, kept=kept)


class Constants:
    """Constants that a call computes with, and that are read once more on the way back.

    They are saved as no input is. So copies are kept where the model is known to overwrite, and elsewhere it is looked
    whether they were.

    Args:
        values: the constants by their place among the leaves of the call, as it is about to be made.
    """

    __slots__ = ("_values", "_versions")

    def __init__(self, values: Mapping[int, Tensor]) -> None:
        self._values = {i: apart(x) for i, x in values.items()}
        self._versions: list[int] = []

    def hold(self, leaves: list[Any]) -> None:
        """Have them among the leaves of the call, which has been made, maybe with a new state of its own."""
        for i, x in self._values.items():
            leaves[i] = x
        self._versions = list(map(version_in, self._values.values()))

    def require(self, name: str) -> None:
        """Raise, as torch does, where one was overwritten since; then the model is run again, and copies are kept.

        Args:
            name: what was called.
        """
        for x, version in zip(self._values.values(), self._versions, strict=True):
            if version_in(x) != version:
                raise RuntimeError(
                    f"a constant that {name} computed with has been modified by an inplace operation before its "
                    "relevance was computed: give it a copy"
                )


def version_in(x: Tensor) -> int:
    """How often a tensor was overwritten, if that is counted."""
    counted = not (transformed() or torch.compiler.is_compiling() or x.is_inference())
    return version_of(x) if counted else 0


def _give_back(kept: _Kept) -> Tensor:
    return kept.tensor


def was_overwritten(error: RuntimeError) -> bool:
    """Whether torch noticed that something the backward pass needs was overwritten, off the tape say."""
    return "modified" in str(error) and "inplace" in str(error)


def natively(module: nn.Module) -> AbstractContextManager[None]:
    """Run a module as it is, but for what it would overwrite."""
    single = not children_of(module) and not module.__dict__.get("inplace")
    return nullcontext() if single else out_of_place(module.modules())


def overwrites(module: nn.Module) -> bool:
    """Whether a layer overwrites its input."""
    # The `inplace` of a TensorDictModule is about its TensorDict.
    return module.__dict__.get("inplace") is True and not isinstance(module, TensorDictModuleBase)


@contextmanager
def out_of_place(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Make what overwrites its input return a new tensor instead, so that values saved for the backward pass stay."""
    changed = [module.__dict__ for module in modules if overwrites(module)]
    if not changed:
        yield
        return

    def in_place() -> None:
        for attributes in changed:
            attributes["inplace"] = True

    with undone(in_place):
        for attributes in changed:
            attributes["inplace"] = False
        yield
