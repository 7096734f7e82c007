"""Functions of torch that hide operations, each with one that does the same in sight while a model is explained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol, TypeAlias
from weakref import finalize

import torch
from torch import Tensor

from tdhook.tape.internals import (
    CHECKPOINTING,
    applying_of,
    script_call,
    script_method_call,
    set_applying,
    set_control_flow,
    set_script_call,
    set_script_method_call,
    written_in_python,
)
from tdhook.tape.undoing import lock, set_to

__all__ = ["Watch", "standing_in", "while_alive"]


Arguments: TypeAlias = "tuple[object, ...]"
Named: TypeAlias = "dict[str, object]"
Contexts: TypeAlias = "Callable[[], tuple[AbstractContextManager[object], AbstractContextManager[object]]]"


class Watch(Protocol):
    """What watches a forward pass, and is told of what no mode sees."""

    @property
    def watching(self) -> bool:
        """Whether torch functions are seen right now."""

    def again(self) -> AbstractContextManager[None] | None:
        """What is entered around a part of the model that is run once more.

        ``None`` says that none can be, so that everything is kept.
        """

    def applied(self, function: type, apply: Callable[..., object], args: Arguments, kwargs: Named) -> object:
        """Make a call of an autograd function, which torch would make by ``apply``."""

    def compiled(self, kind: str, run: Callable[..., object], args: Arguments, kwargs: Named) -> object:
        """Make a call of a module that ``torch.jit`` compiled, given the name of its class and how it runs."""


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)
_LOCK = lock()
_ALIVE: set[object] = set()
_SQUASHING = "torchrl.modules.distributions.continuous"

_Function = CHECKPOINTING.CheckpointFunction
_generator = CHECKPOINTING._checkpoint_without_reentrant_generator


def while_alive(watch: Watch) -> None:
    """Have functions of torch do as :func:`standing_in` says where a pass is watched, as long as ``watch`` lives.

    Elsewhere they do what they do. To replace them for each pass would take longer than a small network takes.
    """
    entry = object()
    _enter(entry)
    finalize(watch, _leave, entry).atexit = False


def standing_in(watch: Watch) -> AbstractContextManager[None]:
    """Have what hides operations run in sight of a mode, which was said to be :func:`while_alive`.

    Functions compiled by ``torch.jit.script`` run as the Python that they were written in. What
    ``torch.utils.checkpoint`` runs once more in the backward pass runs as it did in the forward pass. The squashing of
    actions in torchrl, which has a backward pass of its own, runs as the activations that it is made of. Operators that
    take functions, such as ``torch.cond``, run in Python and are not compiled first.

    Args:
        watch: what watches the pass.
    """
    home = sys.modules.get(_SQUASHING)
    if home is not None and not isinstance(getattr(home, "safetanh_noeps", None), _Squash):
        _replace_squashing(home, ours=True)  # it was imported since
    return set_to(_WATCH, watch)


def _enter(entry: object) -> None:
    """The first of those that are alive replaces what is torch's."""
    with _LOCK:
        _ALIVE.add(entry)
        if len(_ALIVE) == 1:
            _replace(ours=True)


def _leave(entry: object) -> None:
    """The last of them puts it back."""
    with _LOCK:
        _ALIVE.discard(entry)
        if not _ALIVE:
            _replace(ours=False)


def _replace(*, ours: bool) -> None:
    set_script_call(_call_in_python if ours else script_call)
    set_script_method_call(_call_of_method if ours else script_method_call)
    set_applying(_apply if ours else None)
    set_control_flow(_in_python if ours else None)
    CHECKPOINTING.CheckpointFunction = _Checkpoint if ours else _Function
    CHECKPOINTING._checkpoint_without_reentrant_generator = _checkpointed if ours else _generator
    _replace_squashing(sys.modules.get(_SQUASHING), ours=ours)


def _replace_squashing(home: object, *, ours: bool) -> None:
    for name, parts in _SQUASHES.items():
        function = getattr(home, name, None)
        if isinstance(function, _Squash):
            function = function.own
        if function is not None:
            setattr(home, name, _Squash(function, parts) if ours else function)


class _Squash:
    """A function of torchrl that has a backward pass of its own, or its parts."""

    def __init__(self, own: Callable[[Tensor], Tensor], parts: Callable[[Tensor], Tensor]) -> None:
        self.own, self._parts = own, parts

    def __call__(self, x: Tensor) -> Tensor:
        return self.own(x) if _WATCH.get() is None else self._parts(x)


def _safe_tanh(x: Tensor) -> Tensor:
    limit = 1.0 - torch.finfo(x.dtype).resolution
    return x.tanh().clamp(-limit, limit)


def _safe_atanh(y: Tensor) -> Tensor:
    limit = 1.0 - torch.finfo(y.dtype).resolution
    return y.clamp(-limit, limit).atanh()


_SQUASHES = {"safetanh_noeps": _safe_tanh, "safeatanh_noeps": _safe_atanh}


def _call_in_python(function: object, *args: object, **kwargs: object) -> object:
    written = None if _WATCH.get() is None else written_in_python(function)
    return script_call.__get__(function)(*args, **kwargs) if written is None else written(*args, **kwargs)


def _call_of_method(method: Any, *args: object, **kwargs: object) -> object:
    run, watch = script_method_call.__get__(method), _WATCH.get()
    if watch is None:
        return run(*args, **kwargs)
    return watch.compiled(method.owner._type().name(), run, args, kwargs)


def _apply(function: type, *args: object, **kwargs: object) -> object:
    own, watch = applying_of(function), _WATCH.get()
    return own(*args, **kwargs) if watch is None else watch.applied(function, own, args, kwargs)


def _in_python(
    compiled: Callable[..., object], function: Callable[..., object], args: Arguments, kwargs: Named
) -> object:
    watch = _WATCH.get()
    if watch is None or not watch.watching:
        return compiled(function, args, kwargs)
    if (
        function.__name__ == "_cond_op_wrapper"
    ):  # the operator itself takes tensors alone, and no containers of them
        choose: Callable[..., object] = _cond
        return choose(*args)
    return function(*args, **kwargs)


def _cond(
    condition: Tensor | bool,
    if_true: Callable[..., object],
    if_false: Callable[..., object],
    operands: Sequence[object],
) -> object:
    return if_true(*operands) if condition else if_false(*operands)


class _Checkpoint:
    """The variant that differentiates in an autograd function of its own, for which the other one stands in."""

    @staticmethod
    def apply(function: Callable[..., object], preserve: bool, *args: object) -> object:
        if _WATCH.get() is None:
            return _Function.apply(function, preserve, *args)
        return CHECKPOINTING.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


def _checkpointed(
    function: Callable[..., object], preserve: bool, contexts: Contexts, *args: object, **kwargs: object
) -> Generator[None, None, None]:
    """What surrounds a checkpointed part; it is resumed once the part has run."""
    watch = _WATCH.get()
    if watch is None:
        yield from _generator(function, preserve, contexts, *args, **kwargs)
        return
    if watch.again() is None:
        yield
        return

    def both() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        first, second = contexts()
        return first, _Reentered(second, watch)

    yield from _generator(function, preserve, both, *args, **kwargs)


class _Reentered:
    """Is entered as often as there are backward passes."""

    def __init__(self, own: AbstractContextManager[object], watch: Watch) -> None:
        self._own, self._watch = own, watch
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._own.__enter__()
        again = self._watch.again()
        assert again is not None, "it was asked for before the part ran"
        self._entered.append(again)
        again.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)
        self._own.__exit__(kind, error, trace)
