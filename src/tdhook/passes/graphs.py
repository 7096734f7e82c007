"""What an explained module keeps in order to run as one graph; :mod:`tdhook.passes.compiled` makes the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import nn

from tdhook.models.holding import modules_of
from tdhook.models.state import Slot, slots_of

__all__ = ["Compile", "Graphs", "compile_options"]

Compile: TypeAlias = "bool | str | Mapping[str, Any]"

_NUMBERS = count()
_NAMED: WeakValueDictionary[str, Graphs] = WeakValueDictionary()


class Graphs:
    """The graphs of one explained module, and what they are given besides the entries of a TensorDict.

    Args:
        root: the model.
        explain: what a call writes into a TensorDict, operation by operation.
        reads: the entries of a TensorDict that a call depends on.
        reads_signs: whether it spares work to know that no input is negative.
        options: those of ``torch.compile``; ``None`` to make no graph unless inside somebody else's.

    Attributes:
        name: how a graph names the explained module, which is no value that can go into it.
        slots: where the parameters and buffers of the model are.
        modes: where it is whether each of its modules is in training mode.
        wanted: whether calls are to run as a graph.
        function: the compiled function, once there is one.
        rehearsed: numbers of batch axes that a call was seen to work with.
        signed: inputs that were seen to have negative values.
    """

    def __init__(
        self,
        root: nn.Module,
        explain: Callable[[TensorDictBase], dict[NestedKey, Any]],
        reads: Callable[[TensorDictBase], list[NestedKey]],
        reads_signs: Callable[[], bool],
        options: dict[str, Any] | None,
    ) -> None:
        self.root, self.explain, self.reads, self.reads_signs = root, explain, reads, reads_signs
        self.name = f"explained module {next(_NUMBERS)}"
        _NAMED[self.name] = self
        modules = modules_of(root).values()
        self.slots = slots_of(modules)
        self.modes: tuple[Slot, ...] = tuple((module.__dict__, "training") for module in modules)
        self.options = options
        self.wanted = options is not None
        self.function: Callable[..., Any] | None = None
        self.rehearsed: set[int] = set()
        self.signed: set[NestedKey] = set()

    @property
    def replays(self) -> bool:
        """Whether runs may be replays of a CUDA graph, which write where the one before wrote."""
        options = self.options or {}
        wanted = options.get("options", {}).get("triton.cudagraphs", False)
        return bool(wanted) or options.get("mode") in ("reduce-overhead", "max-autotune")

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
