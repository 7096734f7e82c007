"""What an explained module keeps in order to run as one graph; :mod:`tdhook.passes.compiled` makes the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.models.holding import modules_of
from tdhook.models.snapshots import Snapshot
from tdhook.models.state import Slot, slots_of
from tdhook.passes.held import held_by
from tdhook.tape.undoing import undone_where_raised

__all__ = ["Compile", "Graphs", "Remembers", "compile_options"]

Compile: TypeAlias = "bool | str | Mapping[str, Any]"

_NUMBERS = count()
_NAMED: WeakValueDictionary[str, Graphs] = WeakValueDictionary()


class Remembers(Exception):
    """A model holds more than tensors that it changes.

    Args:
        who: the class of the module that does.
        written: what the call wrote.
    """

    def __init__(self, who: str, written: dict[NestedKey, Any]) -> None:
        super().__init__(f"{who} changes what it holds besides tensors, or draws random numbers of its own")
        self.written = written


class Graphs:
    """The graphs of one explained module, and what they are given besides the entries of a TensorDict.

    Args:
        root: the model.
        explain: what a call writes into a TensorDict, operation by operation.
        reads: the entries of a TensorDict that a call depends on.
        reads_signs: whether it spares work to know that no input is negative.
        learnt: what was seen in earlier calls that a graph depends on, in words.
        method: what explains it, which may hold tensors of its own.
        options: those of ``torch.compile``; ``None`` to make no graph unless inside somebody else's.

    Attributes:
        name: how a graph names the explained module, which is no value that can go into it.
        slots: where the parameters and buffers of the model are, and other tensors that its modules hold.
        held: where tensors are that the method holds.
        overwritten: which of the slots hold tensors that a call overwrites.
        modes: where it is whether each of its modules is in training mode.
        wanted: whether calls are to run as a graph.
        function: the compiled function, once there is one.
        rehearsed: numbers of batch axes, and modes of the modules, that a call was seen to work with.
        signed: inputs that were seen to have negative values.
        missed: in how many calls after each other what the graph assumes of values did not hold.
    """

    def __init__(
        self,
        root: nn.Module,
        explain: Callable[[TensorDictBase], dict[NestedKey, Any]],
        reads: Callable[[TensorDictBase], list[NestedKey]],
        reads_signs: Callable[[], bool],
        learnt: Callable[[], str],
        method: object,
        options: dict[str, Any] | None,
    ) -> None:
        self.root, self.explain, self.reads = root, explain, reads
        self.reads_signs, self.learnt = reads_signs, learnt
        self.name = f"explained module {next(_NUMBERS)}"
        _NAMED[self.name] = self
        modules = modules_of(root).values()
        self.slots = slots_of(modules)
        self.held = held_by(method)
        self.overwritten: frozenset[int] = frozenset()
        self.modes: tuple[Slot, ...] = tuple((module.__dict__, "training") for module in modules)
        self.options = options
        self.wanted = options is not None
        self.function: Callable[..., Any] | None = None
        self.rehearsed: set[tuple[int, tuple[bool, ...]]] = set()
        self.signed: set[NestedKey] = set()
        self.missed = 0

    @property
    def replays(self) -> bool:
        """Whether runs may be replays of a CUDA graph, which write where the one before wrote."""
        options = self.options or {}
        wanted = options.get("options", {}).get("triton.cudagraphs", False)
        return bool(wanted) or options.get("mode") in ("reduce-overhead", "max-autotune")

    @property
    def filled(self) -> bool:
        """Whether there is a tensor in each of the slots."""
        slots = (*self.slots, *self.held)
        return all(isinstance(registry.get(name), Tensor) for registry, name in slots)

    def rehearse(self, td: TensorDictBase) -> dict[NestedKey, Any] | None:
        """Make a call operation by operation, to see what the model does to what it holds.

        What is wrong with a call shows here. Afterwards all is as before, unless the call stands.

        Returns:
            What the call writes, where it stands: the model holds other tensors than before, and is to be seen again.

        Raises:
            Remembers: the model holds more than tensors that it changes, and no graph can do so; the call stands.
        """
        modules = tuple(modules_of(self.root).values())
        slots = slots_of(modules)
        kept = [registry[name] for registry, name in slots]
        before = Snapshot(modules)
        with undone_where_raised(before.put_back):
            written = self.explain(td)
        after = slots_of(modules)
        if {(id(registry), name) for registry, name in after} != {(id(r), name) for r, name in slots}:
            return written
        mover = before.moved_besides(slots)
        if mover is not None:
            raise Remembers(type(mover).__name__, written)
        overwritten = frozenset(
            i
            for i, ((registry, name), value) in enumerate(zip(slots, kept, strict=True))
            if registry[name] is value and before.overwrote(value)
        )
        before.put_back()
        if slots == self.slots:
            # In another mode others may be; where more of them are copied than need be, nothing is wrong.
            self.overwritten |= overwritten
        else:
            self.slots, self.overwritten, self.function = slots, overwritten, None
            self.rehearsed.clear()
        self.rehearsed.add(self.way_of(td))
        return None

    def way_of(self, td: TensorDictBase) -> tuple[int, tuple[bool, ...]]:
        """What says whether a call goes another way than those that were seen."""
        return td.batch_dims, tuple([attributes[name] for attributes, name in self.modes])

    def hold(self, changed: Mapping[str, Tensor]) -> None:
        """Have the model hold what a graph returned of it.

        Args:
            changed: tensors by the number of their slot.
        """
        for number, value in changed.items():
            registry, name = self.slots[int(number)]
            held = registry[name]
            if int(number) in self.overwritten and held.shape == value.shape:
                with torch.no_grad(), torch.inference_mode(held.is_inference()):
                    held.copy_(value)
            else:
                registry[name] = value

    @staticmethod
    def named(name: str) -> Graphs:
        """The graphs of the explained module of that name."""
        return _NAMED[name]

    def clear(self) -> None:
        """Drop what was compiled, and compile no more."""
        self.wanted, self.function = False, None


def compile_options(how: Compile) -> dict[str, Any] | None:
    """The arguments of ``torch.compile`` that ``compile=`` stands for, ``None`` for no compilation.

    Raises:
        TypeError: it is none of a truth value, a mode and a dictionary.
    """
    if isinstance(how, bool):
        return {} if how else None
    if isinstance(how, str):
        return {"mode": how}
    if isinstance(how, Mapping):
        return dict(how)
    raise TypeError(
        f"compile is True, a mode such as 'reduce-overhead' or a dictionary of options of torch.compile, got {how!r}"
    )
