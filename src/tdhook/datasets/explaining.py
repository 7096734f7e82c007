"""Explaining rows: one stretch of a data set after the other, each as if nothing had been explained before it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.contexts.attribution import Attribution
from tdhook.contexts.explained import ExplainedModule
from tdhook.contexts.recorded import Recorded
from tdhook.datasets.faults import rows_named
from tdhook.datasets.reducing import Piece
from tdhook.datasets.rows import Rows, Stretch
from tdhook.keys import parts_of
from tdhook.models.loading import Weights, load_weights
from tdhook.models.model import InKeys
from tdhook.tape.undoing import Undoing, undone

__all__ = ["Explaining", "Prepare", "one_way"]

Prepare = Callable[[TensorDictBase], TensorDictBase]
"""Makes rows of the source what the policy reads, as the transforms of its environment do."""

_ONE = RLock()
_REFERENCES = 1024
"""Rows, evenly spread over the source, that means and samples are taken of."""


@dataclass
class Explaining:
    """How rows of a source are explained.

    Attributes:
        method: what is explained and how.
        model: what is explained: a copy, in evaluation mode.
        rows: the source.
        prepare: what makes rows of the source what the model reads.
        in_keys: as in ``method.wrap``.
        out_keys: as there.
        at: the entry of a row that the model reads instead of the row.
        trajectories: whether a row is a trajectory.
        in_order: whether each row came right after the one before it.
        mask_key: truth values, false where a row is padding.
        at_once: how many steps are explained in one pass; by default by their size.
        seed: of what is drawn.
    """

    method: Attribution
    model: nn.Module
    rows: Rows
    prepare: Prepare | None
    in_keys: InKeys | None
    out_keys: Sequence[NestedKey] | None
    at: NestedKey | None
    trajectories: bool
    in_order: bool
    mask_key: NestedKey | None
    at_once: int | None
    seed: int

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).eval()
        self.method = self.method.drawn_from(self._references)
        self.recorded = Recorded(
            self.method,
            self._wrapped,
            at=self.at,
            at_once=self.at_once,
            trajectories=self.trajectories,
            mask_key=self.mask_key,
        )

    def _wrapped(self, method: Attribution) -> ExplainedModule:
        return method.wrap(self.model, self.in_keys, self.out_keys)

    def _references(self) -> TensorDictBase:
        count = len(self.rows)
        wanted = min(count, _REFERENCES)
        spread = sorted({i * count // wanted for i in range(wanted)})
        # Stretches of one row each; reading is lazy, and only what is needed is stacked.
        return self._source(TensorDict.cat([self._read(i, i + 1).clone() for i in spread]))

    def _read(self, begin: int, end: int) -> TensorDictBase:
        rows = self.rows.read(begin, end)
        # A copy: what prepares rows may write to them, and they may be those of the source.
        return rows if self.prepare is None else self.prepare(rows.clone())

    def _source(self, rows: TensorDictBase) -> TensorDictBase:
        """What the model reads of rows."""
        at = parts_of(self.at)
        found = rows.get(at) if at else rows
        assert isinstance(found, TensorDictBase)
        return found

    def load(self, weights: Weights) -> None:
        """Explain with other weights from now on."""
        load_weights(self.model, weights)

    def settle(self) -> None:
        """Say how many rows are explained in one pass, which then is so everywhere."""
        source = self._source(self._read(0, min(2, len(self.rows))))
        if self.trajectories and source.batch_dims < 2:
            raise ValueError(
                f"trajectories=True needs rows that are trajectories, [rows, time]; the source has {source.batch_size}"
            )
        if self.recorded.at_once is None:
            rows = source.reshape(-1, source.batch_size[-1]) if self.trajectories else source.reshape(-1)
            steps = rows.batch_size[-1] if self.trajectories else 1
            self.recorded.at_once = self.recorded.rows_together(rows) * steps

    def anew(self, unit: int) -> None:
        """Explain what comes as if nothing had been explained before: bytes depend on the unit alone."""
        if (
            self.method.compile is None
        ):  # a compiled graph is worth keeping, and knows nothing of what was before
            self.recorded.explained.afresh()
        torch.manual_seed(self.seed + unit)

    def piece(self, begin: int, end: int) -> Piece:
        """Rows ``begin`` to ``end``, explained.

        Raises:
            ValueError: they cannot be explained; the message says which rows.
        """
        ahead = begin + (self.rows.before if isinstance(self.rows, Stretch) else 0)
        before = min(ahead, self.method.steps_before) if self.in_order else 0
        with rows_named(begin, end):
            data = self._read(begin - before, end)
            if self.in_order:
                data = data.copy()
                data.names = ["time", *data.names[1:]]
            found = self.recorded.entries(data, before, begin - before)
            if not self.inputs_of(found):
                raise ValueError(
                    f"nothing that the policy reads gets relevance: {', '.join(map(repr, self.recorded.in_keys))}; "
                    "what is bytes or whole numbers is to be made floating point numbers, by prepare="
                )
        index = torch.arange(begin, end)
        return Piece(data[before:], index, self._relevance(found), found)

    def inputs_of(self, entries: Mapping[NestedKey, Tensor]) -> dict[NestedKey, NestedKey]:
        """Those entries that are relevance, and the input that each is of."""
        name = parts_of(self.method.attribution_key)
        return {
            key: unravel_key(parts_of(key)[len(name) :])
            for key in entries
            if parts_of(key)[: len(name)] == name and len(parts_of(key)) > len(name)
        }

    def axes_of(self, data: TensorDictBase, found: Mapping[NestedKey, Tensor]) -> dict[NestedKey, int]:
        """How many axes of each relevance are before those of the features."""
        axes = {}
        for key, of in self.inputs_of(found).items():
            value = data.get(of, None)
            features = found[key].dim() - data.batch_dims if value is None else value.dim() - data.batch_dims
            axes[key] = found[key].dim() - features
        return axes

    def _relevance(self, found: Mapping[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        return {of: found[key] for key, of in self.inputs_of(found).items()}


def _forget() -> None:
    """In a forked process there are no other threads."""
    global _ONE
    _ONE = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def one_way(threads: int) -> Iterator[None]:
    """Have torch compute in so many threads, with random numbers of its own: the same bits on every machine of a kind.

    How a sum is split among threads decides how it is rounded. Both are the process's: one thread at a time has them.
    """
    with (
        _ONE,
        Undoing(),
        undone(partial(torch.set_rng_state, torch.get_rng_state())),
        undone(partial(torch.set_num_threads, torch.get_num_threads())),
        torch.random.fork_rng(),
    ):
        torch.set_num_threads(threads)
        yield
