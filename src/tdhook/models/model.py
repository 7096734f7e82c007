"""Models: a user's model and the TensorDictModule it is run as."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, skip_existing
from tensordict.utils import NestedKey, unravel_key
from torch import Size, Tensor, nn

from tdhook.keys import ASIDE, names_of, parts_of, put
from tdhook.models.entries import changed, entries_of, leaves_of, objects_of, plain
from tdhook.models.holding import modules_of
from tdhook.models.parallel import running_alone, unwrapped, wrappers_among
from tdhook.models.reads import keys_that_nobody_tells, tells_what_it_reads, written_before
from tdhook.models.state import restored
from tdhook.models.writing import WritingPlainly
from tdhook.tape.copies import copied

__all__ = ["Apart", "InKeys", "Model"]

# What layers of fixed rank raise.
_OF_SHAPE = (RuntimeError, ValueError, IndexError, AssertionError)
_NEVER_BESIDE = frozenset(("attr", *ASIDE))
InKeys: TypeAlias = "Sequence[NestedKey] | Mapping[NestedKey, NestedKey]"


class Wrapped(TensorDictModule):
    """A plain module with keys.

    Tensors are read as they are, where a ``TensorDictModule`` asks of each what else it may be.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        plain = len(args) == 1 and not kwargs and type(args[0]) is TensorDict and self._kwargs is None
        if not plain or skip_existing():
            return super().forward(*args, **kwargs)
        td: TensorDict = args[0]
        values = [td.get(key, None) for key in self.in_keys]
        for value in values:
            if not isinstance(value, Tensor):
                return super().forward(td)
        made = self.module(*values)
        if isinstance(made, dict):
            made = {unravel_key(key): value for key, value in made.items()}
        if isinstance(made, dict | TensorDictBase) and all(key in made for key in self.out_keys):
            made = tuple(made.get(key) for key in self.out_keys)
        return self._write_to_tensordict(td, made if isinstance(made, tuple) else (made,))


@dataclass(frozen=True)
class Apart:
    """How a model returns a TensorDict of its own, and leaves the one alone that it was given.

    Attributes:
        batched: whether it is of the same batch size; else it has none.
        carried: the keys of entries that were there before.
    """

    batched: bool
    carried: tuple[NestedKey, ...]

    def fresh(self, td: TensorDictBase) -> TensorDictBase:
        """What the model would return for ``td``, without what it computes."""
        size, names = (td.batch_size, names_of(td)) if self.batched else ((), None)
        fresh = TensorDict({}, size, names=names, device=td.device)
        for key in self.carried:
            put(fresh, key, td.get(key), of=key)
        return fresh


@dataclass(frozen=True)
class Model:
    """A user's model and the TensorDictModule it is run as: itself, or a wrapper of a plain module.

    Attributes:
        root: the model as it was given; dotted paths are relative to it.
        runner: the TensorDictModule that runs it.
        attributed: which of the keys it reads are attributed.
        made: of each key that it reads, those below it that it writes before.
    """

    root: nn.Module
    runner: TensorDictModuleBase
    attributed: tuple[NestedKey, ...]
    made: Mapping[NestedKey, frozenset[NestedKey]] = field(default_factory=dict, repr=False)
    _flattens: dict[int, bool] = field(default_factory=dict, repr=False)
    _returns: list[Apart | None] = field(default_factory=lambda: [None], repr=False)
    _wrappers: tuple[nn.Module, ...] = field(init=False, repr=False)
    _writing: WritingPlainly = field(init=False, repr=False)
    _tells: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        modules = tuple(modules_of(self.root).values())
        object.__setattr__(self, "_wrappers", wrappers_among(modules))
        object.__setattr__(self, "_writing", WritingPlainly((self.runner, *modules)))
        object.__setattr__(self, "_tells", tells_what_it_reads(self.runner))

    @staticmethod
    def of(
        module: nn.Module,
        in_keys: InKeys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> Model:
        """Make a TensorDictModule of a plain module, or check the keys against those of one.

        What ``DistributedDataParallel`` and ``DataParallel`` are wrapped around is run by itself.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected an nn.Module or a TensorDictModule, got {type(module).__name__}")
        module = unwrapped(module)
        if not isinstance(module, TensorDictModuleBase):
            reads = in_keys if isinstance(in_keys, Mapping) else list(in_keys or ["input"])
            runner = Wrapped(module, reads, list(out_keys or ["output"]))
            return Model(module, runner, tuple(map(unravel_key, runner.in_keys)))
        for name, given, known in (
            ("in_keys", in_keys, module.in_keys),
            ("out_keys", out_keys, module.out_keys),
        ):
            for key in given or ():
                if unravel_key(key) not in map(unravel_key, known):
                    raise ValueError(
                        f"Key {key} not in module.{name}: {list(known)}{keys_that_nobody_tells(module)}"
                    )
        attributed = module.in_keys if in_keys is None else in_keys
        return Model(module, module, tuple(map(unravel_key, attributed)), written_before(module))

    def anew(self) -> Model:
        """The same model, of which nothing is known but what was asked of it."""
        return replace(self, made=written_before(self.runner), _flattens={}, _returns=[None])

    def submodule(self, path: str) -> nn.Module:
        """The module at a dotted path; below a TensorDictModule, paths may start inside the module that it wraps."""
        name = re.sub(r"\[(\w+)\]", r".\1", path).strip(".")
        modules = modules_of(self.root)
        for candidate in (name, f"module.{name}"):
            if candidate in modules:
                return modules[candidate]
        raise ValueError(f"the model has no module {path!r}; it has {', '.join(n for n in modules if n)}")

    @property
    def reads_everything(self) -> bool:
        """Whether what it names is what is attributed, and it reads more: terms of a loss say so."""
        return getattr(self.runner, "reads_everything", False)

    def beside(self, td: TensorDictBase) -> list[NestedKey]:
        """Entries that it may read besides those that it names, where not all of its modules name what they read.

        What it writes, what is ragged, and relevance is none of it; nor is what comes next, but to terms of a loss.
        """
        if self._tells and not self.reads_everything:
            return []
        never = _NEVER_BESIDE if self.reads_everything else _NEVER_BESIDE | {"next"}
        known = {unravel_key(key) for key in (*self.runner.in_keys, *self.runner.out_keys)}
        return [
            key
            for key, value in entries_of(td)
            if unravel_key(key) not in known
            and parts_of(key)[0] not in never
            and not (isinstance(value, tuple) or getattr(value, "is_nested", False))
        ]

    @property
    def apart(self) -> Apart | None:
        """How it returned a TensorDict of its own in its last run, if it did."""
        return self._returns[0]

    def run(self, td: TensorDictBase, again: Callable[[], None] | None = None) -> tuple[TensorDictBase, bool]:
        """Run the model on a TensorDict of any batch shape.

        Layers of fixed rank (convolutions, batch norm) take one batch axis: where the model fails for another number
        of them, it is run with all of them made one.

        Args:
            td: what the model reads; it may be written to.
            again: called where the model is run once more, if anyone wants to know.

        Returns:
            What the model wrote, in the batch shape of ``td``, and whether it ran on a flat batch.
        """
        axes = td.batch_dims
        flattens = axes != 1 and self._flattens.get(axes)
        if flattens is not None:
            return self._flat(td) if flattens else self._written(td), flattens
        try:
            with restored(self.root, always=False):
                written = self._written(td.copy())
        except _OF_SHAPE as error:
            if again is not None:
                again()
            try:
                written = self._flat(td)
            except _OF_SHAPE:
                raise error from None
            self._flattens[axes] = True
            return written, True
        self._flattens[axes] = False
        return written, False

    def tried(self, td: TensorDictBase) -> TensorDictBase:
        """What the model writes for ``td``, which is left as it is, also where the model writes to what it reads."""
        work = td.copy()
        for key in self.runner.in_keys:
            for name, value in leaves_of(key, work.get(key, None)):
                work.set(name, copied(value))
        return self.run(work)[0]

    def _flat(self, td: TensorDictBase) -> TensorDictBase:
        written = self._written(td.reshape(-1))
        return written.reshape(td.batch_size) if td.batch_dims else written.squeeze(0)

    def _written(self, td: TensorDictBase) -> TensorDictBase:
        before = objects_of(td)
        if torch.compiler.is_compiling():
            result = self.runner(td)
        elif self._wrappers:
            with self._writing, running_alone(self._wrappers):
                result = self.runner(td)
        else:
            with self._writing:
                result = self.runner(td)
        after = objects_of(result)
        keys = changed(before, after)
        outputs = plain(result.select(*keys))
        if result is td:
            self._returns[0] = None
            return outputs
        batched = result.batch_size == td.batch_size
        if not batched and not result.batch_dims and _fit(outputs, td.batch_size):
            outputs.batch_size = td.batch_size
        self._returns[0] = Apart(batched, tuple(key for key in after if key not in keys))
        return outputs


def _fit(td: TensorDictBase, batch: Size) -> bool:
    """Whether all tensors begin with the axes of a batch."""
    return all(x.shape[: len(batch)] == batch for _, x in entries_of(td) if isinstance(x, Tensor))
