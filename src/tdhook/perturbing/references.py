"""References: what a model is compared with, for each of the values that are attributed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeAlias, cast

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import GIVEN, entry_at, parts_of, put
from tdhook.models.entries import is_batch
from tdhook.perturbing.baselines import Baseline, OneBaseline, as_values, fitting
from tdhook.perturbing.before import PREVIOUS, markers, step_before
from tdhook.perturbing.chosen import chosen_rows
from tdhook.perturbing.drawn import NAMES, Drawn, entry_named, is_one_row, laid_out_as, mean_of
from tdhook.perturbing.entries import fill

__all__ = ["Baseline", "Fill", "References", "as_references"]

Fill: TypeAlias = "Callable[[TensorDictBase], TensorDictBase]"


class References:
    """What a difference is one from.

    Args:
        baseline: as :class:`~tdhook.attribution.lrp.LRP` takes it.
        samples: how many are drawn where ``"sample"`` is asked for.
        data: a TensorDict of the rows that ``"mean"`` and ``"sample"`` are taken of; by default those of the batch.
        seed: of what is drawn.
        values: whether LRP writes what is explained as it is on the reference, on the mean of several of them: under
            ``("reference", key)``, of the shape of the output ``key``.
        spread: whether the standard deviation of relevance over the references is written, under ``("spread", key)``
            and of the shape of the relevance of ``key``; divided by the root of ``samples`` it is the standard error.

    Raises:
        ValueError: ``samples`` is not positive, nothing is drawn, or there is no spread of one reference.
        TypeError: ``data`` has no keys.
    """

    def __init__(
        self,
        baseline: Baseline = "sample",
        samples: int = 1,
        data: TensorDictBase | None = None,
        seed: int = 0,
        *,
        values: bool = False,
        spread: bool = False,
    ) -> None:
        if type(samples) is not int or samples < 1:
            raise ValueError(f"samples is how many references are drawn, at least one, got {samples!r}")
        if spread and samples == 1:
            raise ValueError("one reference has no spread: draw several, by samples")
        if data is not None and not is_batch(data):
            raise TypeError(
                f"data is a TensorDict of rows by key, got {type(data).__name__}: "
                "data=TensorDict({key: rows}, [len(rows)])"
            )
        self.baseline: Baseline = dict(baseline) if isinstance(baseline, Mapping) else baseline
        self.samples, self.data, self.seed, self.first = samples, data, seed, 0
        self.values, self.spread = values, spread
        if samples > 1 and not self._asks("sample"):
            raise ValueError(f'samples={samples} are drawn of data: give baseline="sample"')

    def __repr__(self) -> str:
        baseline = repr(self.baseline) if isinstance(self.baseline, str | float | int) else "..."
        return f"References({baseline}{f', samples={self.samples}' if self.samples > 1 else ''})"

    @property
    def constant(self) -> bool:
        """Whether the references are the same for each batch, as far as they are known beforehand."""
        return not any(isinstance(given, str | tuple) or callable(given) for given in self._all)

    @property
    def _all(self) -> list[OneBaseline]:
        """What is given, by whatever key."""
        baseline = self.baseline
        return list(baseline.values()) if isinstance(baseline, Mapping) else [baseline]

    def _asks(self, name: str) -> bool:
        """Whether a baseline is given by a name."""
        return any(isinstance(given, str) and given == name for given in self._all)

    def of(
        self, values: Mapping[NestedKey, Tensor], batch_dims: Mapping[NestedKey, int], td: TensorDictBase
    ) -> list[Drawn]:
        """The references of a batch.

        Args:
            values: what is attributed, ``[*batch, *shape]`` by key: what depends on no other of it.
            batch_dims: how many axes of each are those of the batch.
            td: what the model was called with.

        Raises:
            KeyError: something is named that is not there.
            ValueError: a baseline does not fit.
        """
        return [self.one(number, values, batch_dims, td) for number in range(self.samples)]

    def one(
        self,
        number: int,
        values: Mapping[NestedKey, Tensor],
        batch_dims: Mapping[NestedKey, int],
        td: TensorDictBase,
    ) -> Drawn:
        """The reference of a number, as :meth:`of` gives all."""
        keys = {_plain(key): key for key in values}
        number += self.first
        drawn = Drawn()
        for name, given in self._named(list(keys), td, number).items():
            if name in keys:
                key = keys[name]
                drawn.replaced[key] = self._made(given, name, values[key], batch_dims[key], td, number)
            else:
                value = td.get(name)
                made = self._made(given, name, value, td.batch_dims, td, number)
                drawn.entries[name] = laid_out_as(value, made)
        return drawn

    def several(
        self,
        numbers: range,
        values: Mapping[NestedKey, Tensor],
        batch_dims: Mapping[NestedKey, int],
        td: TensorDictBase,
    ) -> dict[NestedKey, Tensor]:
        """Some of the references, ``[references, *value]`` by the key of the value, or of the entry that is read."""
        keys = {_plain(key): key for key in values}
        numbers = range(numbers.start + self.first, numbers.stop + self.first)
        named = [(number, self._named(list(keys), td, number)) for number in numbers]
        found = {}
        for name, first in named[0][1].items():
            key = keys.get(name, name)
            value, dims = (values[key], batch_dims[key]) if name in keys else (td.get(name), td.batch_dims)
            if isinstance(first, str) and first == "sample":
                source, rows = self._source(name, value, dims, None), value.shape[:dims].numel()
                drawn = source[chosen_rows(self.seed, numbers, source.shape[0], rows, source.device)]
                many = value.expand(len(numbers), *value.shape)
                found[key] = fitting(drawn.reshape(many.shape), name, many)
            else:
                found[key] = torch.stack(
                    [self._made(one[name], name, value, dims, td, n) for n, one in named]
                )
        return found

    def only(self, number: int) -> References:
        """One of them alone."""
        other = copy.copy(self)
        other.samples, other.first, other.values, other.spread = 1, self.first + number, False, False
        return other

    def among_keys(self, attributed: Collection[NestedKey], keys: Iterable[NestedKey]) -> References:
        """The same for some of the keys that are attributed, where there may be others by name."""
        if not isinstance(self.baseline, Mapping):
            return self
        left = set(map(unravel_key, attributed)) - set(map(_plain, keys))
        other = copy.copy(self)
        other.baseline = {key: given for key, given in self.baseline.items() if unravel_key(key) not in left}
        return other

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """The entries of a TensorDict that references are taken of, besides what is attributed."""
        found: list[NestedKey] = list(self.baseline) if isinstance(self.baseline, Mapping) else []
        if self._asks(PREVIOUS):
            found += markers(td)
        for given in self._all:
            if isinstance(given, tuple) or (isinstance(given, str) and given not in NAMES):
                found.append(given)
        return [key for key in map(unravel_key, found) if entry_at(td, parts_of(key)) is not None]

    def among(self, td: TensorDictBase) -> References:
        """The same, with means and samples of ``td`` unless there are data already.

        Raises:
            ValueError: it is the step before, which no row knows alone.
        """
        if self._asks(PREVIOUS) and (PREVIOUS,) not in {parts_of(key)[:1] for key in td.keys(True)}:
            raise ValueError(
                'baseline="previous" is the step before, which is not known where rows are looked at one by one: give '
                'the values of that step as entries ("previous", key), as tdhook.rl.StepBefore does'
            )
        return self.drawn_from(lambda: td)

    def drawn_from(self, rows: Callable[[], TensorDictBase]) -> References:
        """The same, with means and samples of these rows unless there are data already.

        Args:
            rows: gives them, if they are wanted.
        """
        if self.data is not None or not (self._asks("mean") or self._asks("sample")):
            return self
        other = copy.copy(self)
        other.data = rows()
        return other

    @property
    def steps_before(self) -> int:
        """How many steps before a step are looked at."""
        return 1 if self._asks(PREVIOUS) else 0

    def settled(
        self,
        keys: Sequence[NestedKey],
        td: TensorDictBase,
        valid: Tensor | None = None,
        *,
        each: bool = False,
        first: int = 0,
    ) -> tuple[References, TensorDictBase, Fill]:
        """The same references for parts of a batch, where what they are depends on more than a part.

        Args:
            keys: what is attributed. What is no entry of the TensorDict, as a value inside the model, is not settled.
            td: the whole batch.
            valid: ``[*batch]``, which elements may be drawn; all by default.
            each: whether each element has an entry of its own where one row is for all, too, but for numbers.
            first: how many elements there are before those of ``td``: what is drawn goes by the number among all.

        Returns:
            References to entries; the batch with those that are known; and what adds those that are drawn to a part.
        """
        named = self._named([_plain(key) for key in keys], td, 0)
        given: dict[NestedKey, OneBaseline] = {}
        drawn: dict[NestedKey, Tensor] = {}
        td = td.copy()
        for key, one in named.items():
            value = td.get(key)
            whole = key in keys and not value.is_floating_point()
            if whole:
                value = value.to(torch.get_default_dtype())
            try:
                if isinstance(one, str) and one == "sample":
                    drawn[key] = self._source(key, value, td.batch_dims, valid)
                    continue
                if isinstance(one, str) and one == "mean":
                    one = mean_of(self._source(key, value, td.batch_dims, valid))
                if is_one_row(one, 0 if each else value.dim() - td.batch_dims):
                    given[key] = one
                else:
                    self._put(td, key, one, value)
                    given[key] = (GIVEN,)
            except KeyError:  # of what may be an index, which is compared with nothing
                if not whole or isinstance(self.baseline, Mapping):
                    raise
        numbers = range(self.first, self.first + self.samples)
        for number in numbers if drawn else ():
            for count in {len(source) for source in drawn.values()}:
                rows = chosen_rows(self.seed, number, count, td.numel(), td.device, first)
                td.set((GIVEN, f"{number}", f"of {count}"), rows.reshape(td.batch_size))
        return _Settled(self, given, tuple(drawn)), td, partial(fill, drawn, numbers)

    def _put(self, td: TensorDictBase, key: NestedKey, given: OneBaseline, value: Tensor) -> None:
        """Write what a key is compared with as an entry."""
        made = self._made(given, key, value, td.batch_dims, td, 0)
        put(td, (GIVEN, *parts_of(key)), laid_out_as(value, made), key)

    def _source(self, key: NestedKey, value: Tensor, dims: int, valid: Tensor | None) -> Tensor:
        """The rows that a mean or a sample is taken of, ``[rows, *shape]``."""
        rows = value.reshape(-1, *value.shape[dims:])
        if self.data is not None:
            return self._rows(key, rows)
        if valid is not None:
            rows = rows[valid.reshape(-1).to(rows.device)]
        if rows.shape[0] == 1:
            raise ValueError(
                f"the mean or a sample of the batch is {key!r} itself where the batch has one element, and nothing "
                'would differ: say what it is compared with, baseline=References("mean", data=...)'
            )
        return rows

    def _named(self, keys: list[NestedKey], td: TensorDictBase, number: int) -> dict[NestedKey, OneBaseline]:
        """What is given for each key, for the reference of a number."""
        baseline = self.baseline
        if not isinstance(baseline, Mapping):
            return dict.fromkeys(keys, baseline)
        named = {unravel_key(key): given for key, given in baseline.items()}
        for key in named:
            if key not in keys and key not in td.keys(True):
                raise KeyError(
                    f"the baseline names {key!r}, which is neither attributed ({', '.join(map(repr, keys))}) nor an "
                    "entry of the TensorDict"
                )
        return named

    def _made(
        self,
        given: OneBaseline,
        key: NestedKey,
        value: Tensor,
        dims: int,
        td: TensorDictBase,
        number: int,
    ) -> Tensor:
        rows = value.reshape(-1, *value.shape[dims:])
        if isinstance(given, str | tuple) and not (isinstance(given, str) and given in NAMES):
            return entry_named(cast(NestedKey, given), key, value, td)
        if isinstance(given, str):
            if given == PREVIOUS:
                return fitting(step_before(key, value, td), key, value)
            made = self._source(key, value, dims, None)
            if given == "sample":
                made = made[chosen_rows(self.seed, number, made.shape[0], rows.shape[0], made.device)]
            else:
                made = mean_of(made)
        else:
            made = given(rows) if callable(given) else as_values(given)
            if made.dim() > 1 and made.shape == value.shape:
                made = made.reshape(rows.shape)  # a row each
        return fitting(made, key, rows).reshape(value.shape)

    def _rows(self, key: NestedKey, rows: Tensor) -> Tensor:
        assert self.data is not None
        if key not in self.data.keys(True):
            known = ", ".join(sorted(map(str, self.data.keys(True, True)))) or "nothing"
            raise KeyError(
                f"the data that baselines are taken of have no {key!r}, but {known}; for a value inside the model they "
                "hold what it is on other inputs, under this name, or are left out, and the batch is drawn from"
            )
        found: Tensor = self.data.get(key)
        return found.reshape(-1, *rows.shape[1:])


class _Settled(References):
    """References that are entries of the TensorDict already, some of them another one for each sample.

    Args:
        of: what was settled.
        given: by key.
        drawn: keys whose references were drawn.
    """

    def __init__(
        self, of: References, given: Mapping[NestedKey, OneBaseline], drawn: Sequence[NestedKey]
    ) -> None:
        self.baseline, self.samples, self.data, self.seed = of.baseline, of.samples, of.data, of.seed
        self.first = of.first
        self.values, self.spread = of.values, of.spread
        self._given, self._drawn = given, drawn

    def settled(
        self,
        keys: Sequence[NestedKey],
        td: TensorDictBase,
        valid: Tensor | None = None,
        *,
        each: bool = False,
        first: int = 0,
    ) -> tuple[References, TensorDictBase, Fill]:
        """They are, but for one row for all."""
        rows = [key for key in keys if each and not is_one_row(self._given.get(key, 0.0), 0)]
        rows = [key for key in rows if isinstance(self._given[key], Tensor)]
        if not rows:
            return self, td, partial(fill, {}, range(0))
        other, td = copy.copy(self), td.copy()
        for key in rows:
            self._put(td, key, self._given[key], td.get(key))
        other._given = {**self._given, **dict.fromkeys(rows, (GIVEN,))}
        return other, td, partial(fill, {}, range(0))

    @property
    def constant(self) -> bool:
        """Whether none of them is an entry."""
        return not self._drawn and not any(isinstance(one, tuple) for one in self._given.values())

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """All that was settled."""
        return [key for key in (GIVEN,) if key in td]

    def _named(self, keys: list[NestedKey], td: TensorDictBase, number: int) -> dict[NestedKey, OneBaseline]:
        known = {**self._given, **dict.fromkeys(self._drawn, (GIVEN, f"{number}"))}
        if isinstance(self.baseline, Mapping):
            return known
        if isinstance(self.baseline, str) and self.baseline in NAMES and not known.keys() >= set(keys):
            inner = next(key for key in keys if key not in known)
            raise ValueError(
                f"{inner!r} is a value inside the model, whose baseline {self.baseline!r} would depend on how the "
                "batch is cut to be explained; give a number, a tensor, a function of single rows, or an entry"
            )
        return {key: known.get(key, self.baseline) for key in keys}


def as_references(baseline: Baseline | References | None, samples: int) -> References | None:
    """What :class:`References` a baseline stands for: a TensorDict is data to draw from."""
    if baseline is None:
        if samples != 1:
            raise ValueError("samples says how many baselines are drawn: give baseline too")
        return None
    if isinstance(baseline, References):
        if samples not in (1, baseline.samples):
            raise ValueError(
                f"References(samples={baseline.samples}) says how many are drawn, and samples={samples} too"
            )
        return baseline
    if isinstance(baseline, TensorDictBase):
        return References("sample", samples, baseline)
    return References(baseline, samples)


def _plain(key: NestedKey) -> NestedKey:
    return key[0] if isinstance(key, tuple) and len(key) == 1 else key
