"""Recorded batches: what was seen and done before is explained afterwards, as much at once as fits.

Everything that replay buffers, what collectors bring, and whole data sets have in common: which entries are read, what
stands in for what the model would choose now, padding, trajectories, and baselines that are those of the whole batch.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tdhook.contexts.attribution import Attribution
from tdhook.contexts.explained import ExplainedModule
from tdhook.keys import ASKED, known_keys, parts_of, under
from tdhook.models.entries import is_batch, leaves_of, plain
from tdhook.models.model import Model
from tdhook.models.reads import keys_that_nobody_tells
from tdhook.models.state import restored
from tdhook.passes.rows import joined
from tdhook.perturbing.before import PREVIOUS
from tdhook.tape.axes import beside
from tdhook.tape.undoing import Undoing, all_of, undone
from tdhook.targets.hindsight import InHindsight

__all__ = ["Recorded", "padding_told", "recurrent", "rows_at_once"]

_VALID = "_explain_valid"
_RECURRENT = "torchrl.modules"
# What a step of explaining costs beside its arithmetic is shared by more rows, until they no longer fit a cache.
_WORKING_SET = 8 << 20
_FEWEST, _MOST = 8, 4096

Entries: TypeAlias = "Callable[[TensorDictBase], Mapping[NestedKey, Tensor]]"


class _Outputs(TorchFunctionMode):
    """Adds up the bytes of what functions compute; views of it are the same bytes."""

    size = 0

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, Tensor) and x._base is None:
                self.size += x.numel() * x.element_size()
        return found


def rows_at_once(model: Model, rows: TensorDictBase) -> int:
    """How many rows are explained in one pass, so that what the model computes of them fits a cache.

    Args:
        model: is run on the first row, to see how much that is.
        rows: ``[rows, ...]``.
    """
    seen = _Outputs()
    with (
        suppress(Exception),
        restored(model.root),
        torch.no_grad(),
        seen,
    ):  # what is wrong is said where they are explained
        model.runner(rows[:1].clone())
    fitting = _WORKING_SET // max(1, seen.size)
    return max(_FEWEST, min(_MOST, 1 << max(0, fitting.bit_length() - 1)))


def padding_told(td: TensorDictBase, mask_key: NestedKey | None) -> Tensor | None:
    """The entry that says which steps of a batch are none of padding, if it has one.

    It warns where torchrl has put one elsewhere.
    """
    found: Tensor | None = None if mask_key is None else td.get(mask_key, None)
    other = td.get("mask", None) if found is None and mask_key == ("collector", "mask") else None
    if isinstance(other, Tensor) and other.shape == td.batch_size and other.dtype is torch.bool:
        warnings.warn(
            "the batch has no ('collector', 'mask'), but a 'mask' of its steps, as split_trajectories writes it where "
            "there are no entries of a collector: give mask_key='mask', so that padding is not explained, or "
            "mask_key=None",
            stacklevel=2,
        )
    return found


class Recorded:
    """Explains batches that were recorded.

    Args:
        method: what is explained and how.
        explained: makes an explained module of a method, whose target takes what the batch says was chosen.
        at: the entry of the batch that the module reads instead of the batch itself.
        under: a key under which all is put that is added.
        at_once: how many steps are explained in one pass; by default by their size (:func:`rows_at_once`).
        trajectories: whether the module looks along the last axis of the batch, which is time.
        mask_key: truth values ``[*batch]``, if the batch has them: elsewhere is padding.
    """

    def __init__(
        self,
        method: Attribution,
        explained: Callable[[Attribution], ExplainedModule],
        *,
        at: NestedKey | None = None,
        under: NestedKey | None = None,
        at_once: int | None = None,
        trajectories: bool = False,
        mask_key: NestedKey | None = None,
    ) -> None:
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once is at least 1, got at_once={at_once}")
        self.method = method
        self.at, self.under = parts_of(at), parts_of(under)
        self.at_once, self.trajectories, self.mask_key = at_once, trajectories, mask_key
        self._make = explained
        self._together: dict[torch.Size, int] = {}
        self.explained = self.anew()

    def anew(self) -> ExplainedModule:
        """An explained module that nothing was explained by yet."""
        self.explained = self._make(self.method.explaining(InHindsight(self.method.seeder, _VALID)))
        return self.explained

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of a batch that the module reads."""
        return [unravel_key((*self.at, *parts_of(key))) for key in self.explained.in_keys]

    @property
    def out_keys(self) -> list[NestedKey]:
        """Entries that are added to a batch, as far as they are known before it is explained."""
        return [
            self._destination(key) for key in map(parts_of, self.explained.out_keys) if self._is_ours(key)
        ]

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """Entries of a batch that anything depends on."""
        td = plain(td)
        source = self._source(td)
        found = [unravel_key((*self.at, *parts_of(key))) for key in self.explained.reads(source)]
        found += [key for key in self._method_here().reads(td) if td.get(key, None) is not None]
        if self.mask_key is not None and td.get(self.mask_key, None) is not None:
            found.append(self.mask_key)
        return list(dict.fromkeys(found))

    def entries(self, td: TensorDictBase, skip: int = 0, first: int = 0) -> dict[NestedKey, Tensor]:
        """What is added to a batch.

        Args:
            td: of any batch size; left as it is.
            skip: how many rows, from the first, are there for those after them alone: of these nothing is found.
            first: how many rows there are before these, where they are some of a data set.

        Returns:
            By key, ``[*batch, ...]``.

        Raises:
            KeyError: the batch lacks what the module reads.
            ValueError: the batch is empty.
        """
        td = plain(td)
        source = self._source(td)
        if not source.batch_size.numel():
            raise ValueError(
                f"there is nothing to explain: the batch is empty (batch size {list(source.batch_size)})"
            )
        valid = padding_told(td, self.mask_key)
        if valid is not None:
            valid = valid.reshape((*td.batch_size, *(1,) * (source.batch_dims - td.batch_dims)))
            valid = valid.expand(source.batch_size)
            if not (valid[skip:] if skip else valid).any():
                return self._of_padding(td[skip:] if skip else td)
        ours = self._method_here()
        whole = self._beside_trajectories(td, source, ours)
        elements = first * (whole.numel() // len(whole)) if first else 0
        method, whole, fill = ours.settled(self._attributed(source), whole, valid, first=elements)
        if skip:
            whole, valid = whole[skip:], valid if valid is None else valid[skip:]
        with Undoing(), undone(partial(self.explained.explain_by, ours)):
            self.explained.explain_by(method)
            return self._settled(whole, valid, fill)

    def _of_padding(self, td: TensorDictBase) -> dict[NestedKey, Tensor]:
        """What is added to padding alone: zeros, of the shapes that are found of steps with nothing in them."""
        assert self.mask_key is not None
        blank, chosen = td.clone(), set(map(parts_of, self.method.seeder.entries or ()))
        for key, value in td.items(True, True):
            if isinstance(value, Tensor):
                nothing = torch.full_like(value, value.dtype is torch.bool)  # a mask of actions has some
                several = value.dim() > td.batch_dims and value.shape[-1] > 1
                if several and parts_of(key) in chosen and not value.is_floating_point():
                    nothing.zero_()[..., 0] = 1  # one-hot
                blank.set(key, nothing)
        blank.set(self.mask_key, torch.ones_like(td.get(self.mask_key)))
        return {key: torch.zeros_like(value) for key, value in self.entries(blank).items()}

    def _source(self, td: TensorDictBase) -> TensorDictBase:
        source = td.get(self.at, None) if self.at else td
        if not is_batch(source):
            raise KeyError(f"the batch has no {unravel_key(self.at)!r} to read from; it has {known_keys(td)}")
        return plain(source)

    def _method_here(self) -> Attribution:
        ours = self.explained.method
        assert isinstance(ours, Attribution)
        return ours

    def _beside_trajectories(
        self, td: TensorDictBase, source: TensorDictBase, method: Attribution
    ) -> TensorDictBase:
        """What is read, with what the batch tells of its trajectories, and what was before that which came next."""
        whole = source
        if self.trajectories and source.batch_dims and "time" not in source.names:
            whole = source.copy()
            whole.names = [*source.names[:-1], "time"]
        if not self.at:
            return whole
        whole = whole.copy()
        for key in method.reads(td):
            if whole.get(key, None) is None:
                whole.set(key, td.get(key))
        for key in self._attributed(source) if self.at == ("next",) else ():
            before = td.get(key, None)
            if before is not None and whole.get((PREVIOUS, *parts_of(key)), None) is None:
                whole.set((PREVIOUS, *parts_of(key)), before)
        return whole

    def _attributed(self, source: TensorDictBase) -> list[NestedKey]:
        """The entries of what is read that are attributed."""
        reads = [parts_of(key) for key in self.explained.in_keys]
        given = [key for key in self.explained.attributed if parts_of(key) in reads]
        return [leaf for key in given for leaf, _ in leaves_of(key, source.get(key, None))]

    def _settled(
        self,
        source: TensorDictBase,
        valid: Tensor | None,
        fill: Callable[[TensorDictBase], TensorDictBase],
    ) -> dict[NestedKey, Tensor]:
        work = self._read(source)
        attributed = self._attributed(source)
        for key, value in work.items(True, True):
            if isinstance(value, Tensor) and key not in attributed:  # which the module may write to
                work.set(key, value.clone())
        here = next((x.device for x in work.values(True, True) if isinstance(x, Tensor)), None)
        there = next((x.device for x in self.explained.model.root.parameters()), here)
        if here != there:
            work = work.to(there)
        valid = valid if valid is None else valid.to(there)

        def entries(part: TensorDictBase) -> dict[NestedKey, Tensor]:
            found = self.explained(fill(part))
            return {key: value for key, value in found.items(True, True) if self._is_ours(parts_of(key))}

        cut = self._by_trajectory if self.trajectories else self._by_step
        with _random_state_kept(there):
            whole = cut(work, valid, entries)
        return {self._destination(parts_of(key)): value.to(here) for key, value in whole.items()}

    def _read(self, source: TensorDictBase) -> TensorDictBase:
        """What of the batch is needed."""
        for key in self.explained.in_keys:
            if source.get(key, None) is None:
                missing = under(self.at, key)
                raise KeyError(
                    f"the batch has no {missing!r}, which the explained module reads; there are {known_keys(source)}"
                    f"{keys_that_nobody_tells(self.explained.model.root)}"
                )
        kept = source.select(*self.explained.reads(source), strict=False)
        return kept.exclude(*(key for key in kept.keys(True, True) if self._is_ours(parts_of(key))))

    def _by_step(
        self, work: TensorDictBase, valid: Tensor | None, entries: Entries
    ) -> dict[NestedKey, Tensor]:
        """Each step for itself, so many of them together."""
        batch = work.batch_size
        flat = work.reshape(-1)
        there = None if valid is None else valid.reshape(-1).nonzero()[:, 0]
        found: dict[NestedKey, Tensor] = {}
        rows = flat if there is None else flat[there]
        for key, value in joined(rows, self.rows_together(rows), entries).items():
            if there is not None:
                value = value.new_zeros(batch.numel(), *value.shape[1:]).index_copy_(0, there, value)
            found[key] = value.reshape((*batch, *value.shape[1:]))
        return found

    def _by_trajectory(
        self, work: TensorDictBase, valid: Tensor | None, entries: Entries
    ) -> dict[NestedKey, Tensor]:
        """Trajectory by trajectory, as many together as come to about so many steps."""
        batch = work.batch_size
        if not batch:
            raise ValueError("a batch of trajectories has an axis for time, and this one has no axes")
        if valid is not None:
            work = work.copy()
            for key in self.method.seeder.entries or ():
                taken = None if parts_of(key)[0] == ASKED else work.get(key, None)
                if taken is not None:  # what stands in the padding may be no action at all
                    work.set(key, torch.where(beside(valid, taken), taken, taken[valid][0]))
            work.set(_VALID, valid)
        rows = work.reshape(-1, batch[-1])
        with recurrent():
            whole = joined(rows, self.rows_together(rows), entries)
        return {key: value.reshape((*batch, *value.shape[2:])) for key, value in whole.items()}

    def rows_together(self, rows: TensorDictBase) -> int:
        """How many rows, or trajectories, are explained in one pass.

        Args:
            rows: ``[rows]``, or ``[trajectories, time]``.
        """
        if self.at_once is not None:
            return max(1, self.at_once // (rows.batch_size[-1] if self.trajectories else 1))
        tail = rows.batch_size[1:]
        if tail not in self._together and rows.numel():
            with _random_state_kept(None):
                self._together[tail] = rows_at_once(self.explained.model, rows)
        return self._together.get(tail, _FEWEST)

    def _is_ours(self, key: tuple[str, ...]) -> bool:
        name, valued = parts_of(self.method.attribution_key), parts_of(self.method.value_key)
        written = (*self.method.writes, *self.method.seeder.tells)
        beside = key[0] in self.method.writes_under or key in map(parts_of, written)
        if self.method.values is not False and len(key) > len(valued):
            beside = beside or key[: len(valued)] == valued
        return key[: len(name)] == name or beside

    def told_by(self, key: NestedKey) -> tuple[str, ...] | None:
        """What of the batch an entry that is added tells of."""
        parts = parts_of(key)[len(self.under) :]
        return parts[self._length_of_name(parts) :] or None

    def _destination(self, key: tuple[str, ...]) -> NestedKey:
        count = self._length_of_name(key)
        return unravel_key((*self.under, *key[:count], *self.at, *key[count:]))

    def _length_of_name(self, key: tuple[str, ...]) -> int:
        name = parts_of(self.method.attribution_key)
        return len(name) if key[: len(name)] == name else 1


@contextmanager
def recurrent() -> Iterator[None]:
    """Have torchrl's recurrent modules look along time, if there can be any."""
    torchrl = sys.modules.get(_RECURRENT)
    if torchrl is None:
        yield
        return
    before = torchrl.recurrent_mode()
    with undone(lambda: torchrl.set_recurrent_mode(before).__enter__()):
        torchrl.set_recurrent_mode("recurrent").__enter__()
        yield


def _random_state_kept(device: torch.device | None) -> AbstractContextManager[object]:
    """Have a policy that samples draw nothing from the caller's random numbers.

    Not in another thread: to put the state back there would have this one draw the same numbers twice.
    """
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()
    here = undone(partial(torch.set_rng_state, torch.get_rng_state()))
    there = None if device is None or device.type != "cuda" else torch.random.fork_rng(devices=[device])
    return all_of(here, there)
