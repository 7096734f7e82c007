"""Again: calls that were made before and are made once more, for what a rule or the ledger asks of them.

The model must not notice: what its modules hold is put back, and the random numbers are those that the call drew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tdhook.models.snapshots import Snapshot
from tdhook.models.state import slots_of
from tdhook.relevance.propagation.operation import Operation
from tdhook.tape.internals import children_of
from tdhook.tape.undoing import undone

__all__ = ["Again", "remembers"]


class Again:
    """What a call finds, so that it can be made once more.

    Args:
        modules: what may hold something that the call changes.
        generators: random generators that it is given.
    """

    __slots__ = ("_drawn", "_generators", "_held", "_modules", "_slots", "_values")

    def __init__(self, modules: Sequence[nn.Module] = (), generators: Sequence[torch.Generator] = ()) -> None:
        self._modules, self._generators = modules, generators
        self._drawn = _drawn(generators)
        # Tensors are not written back to: a tape may have kept them. Copies stand in for them meanwhile.
        self._slots = [slot for slot in slots_of(modules) if not isinstance(slot[0][slot[1]], nn.Parameter)]
        tensors: list[Tensor] = [registry[name] for registry, name in self._slots]
        self._values = [x.detach().clone() for x in tensors]
        self._held = Snapshot(modules, alone=True, without=tensors) if modules else None

    @staticmethod
    def of(module: nn.Module, kwargs: Mapping[str, object]) -> Again:
        """What a call of a module, or of an operation, finds."""
        if isinstance(module, Operation):
            return Again((), [given for given in kwargs.values() if isinstance(given, torch.Generator)])
        return Again(tuple(module.modules()) if remembers(module) else ())

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Make the call once more, as it was made; afterwards all is as it is now."""
        with undone(Again(self._modules, self._generators)._put_back):
            self._put_back()
            self._stand_in()
            yield

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Make the call, and put back what it changes."""
        with undone(self._put_back):
            self._stand_in()
            yield

    def _stand_in(self) -> None:
        for (registry, name), value in zip(self._slots, self._values, strict=True):
            registry[name] = value.clone()

    def _put_back(self) -> None:
        if self._held is not None:
            self._held.put_back()
        now = _drawn(self._generators)
        if not all(map(torch.equal, now, self._drawn)):  # others, in other threads, may draw as well
            _set_drawn(self._drawn, self._generators)


def remembers(module: nn.Module) -> bool:
    """Whether calls of a module may change what it holds, or draw random numbers."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    return module.training or not own or bool(children_of(module))


def _drawn(generators: Sequence[torch.Generator]) -> list[Tensor]:
    """The states of the random numbers that torch functions draw."""
    if torch.compiler.is_compiling():
        return []
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
    return [torch.get_rng_state(), *(generator.get_state() for generator in generators), *devices]


def _set_drawn(states: Sequence[Tensor], generators: Sequence[torch.Generator]) -> None:
    torch.set_rng_state(states[0])
    for generator, state in zip(generators, states[1:], strict=False):
        generator.set_state(state)
    if len(states) > 1 + len(generators):
        torch.cuda.set_rng_state_all(list(states[1 + len(generators) :]))
