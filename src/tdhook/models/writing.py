"""Writing: TensorDictModules write the tensors that they made as they are.

Of each value a ``TensorDictModule`` asks what else it may be: whether it is a data frame, say, for which it looks for
pandas on the disk. That takes as long as two layers of a small policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.tape.undoing import Change

__all__ = ["WritingPlainly"]

_NAME = "_write_to_tensordict"
_THEIRS = TensorDictModule._write_to_tensordict


def _write(
    module: TensorDictModule,
    tensordict: TensorDictBase,
    tensors: Sequence[object],
    tensordict_out: TensorDictBase | None = None,
    out_keys: Sequence[NestedKey] | None = None,
) -> TensorDictBase:
    """Write what a module made, as it does itself: tensors at once, anything else by its own way."""
    keys = module.out_keys_source if out_keys is None else out_keys
    plain = tensordict_out is None and module.inplace is True and len(tensors) == len(keys)
    if not plain or "_" in keys or not all(isinstance(z, Tensor) for z in tensors):
        written: TensorDictBase = _THEIRS(module, tensordict, tensors, tensordict_out, out_keys)
        return written
    for key, z in zip(keys, tensors, strict=True):
        tensordict.set(key, z)
    return tensordict


class WritingPlainly:
    """Has modules write by the quicker way within, as far as they have no way of their own.

    Args:
        modules: those among which TensorDictModules are looked for.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._writes: list[tuple[nn.Module, partial[TensorDictBase]]] = [
            (module, partial(_write, module))
            for module in dict.fromkeys(modules)
            if isinstance(module, TensorDictModule) and type(module)._write_to_tensordict is _THEIRS
        ]
        self._changes: list[Change] = []

    def __enter__(self) -> None:
        self._changes.append(Change(self._take_off))
        for module, way in self._writes:
            module.__dict__.setdefault(_NAME, way)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._changes.pop().undo()

    def _take_off(self) -> None:
        for module, way in self._writes:
            if module.__dict__.get(_NAME) is way:
                del module.__dict__[_NAME]
