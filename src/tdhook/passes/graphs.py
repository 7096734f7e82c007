"""What an explained module keeps in order to run as one graph; :mod:`tdhook.passes.compiled` makes the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakValueDictionary

from tensordict.utils import NestedKey

from tdhook.models.state import Slot, modules_of, slots_of

if TYPE_CHECKING:
    from tdhook.contexts.explained import ExplainedModule

__all__ = ["Compile", "Graphs", "compile_options"]

Compile: TypeAlias = "bool | str | Mapping[str, Any]"

_NUMBERS = count()
_OWNERS: WeakValueDictionary[str, ExplainedModule] = WeakValueDictionary()


class Graphs:
    """The graphs of one explained module, and what they are given besides the entries of a TensorDict.

    Args:
        owner: the explained module.
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

    def __init__(self, owner: ExplainedModule, options: dict[str, Any] | None) -> None:
        self.name = f"explained module {next(_NUMBERS)}"
        _OWNERS[self.name] = owner
        modules = modules_of(owner._model.root).values()
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
    def owner(name: str) -> ExplainedModule:
        """The explained module of that name."""
        return _OWNERS[name]

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
