"""References: what a model is compared with, for each of the values that are attributed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.keys import parts_of
from tdhook.perturbing.baselines import Baseline, OneBaseline, fitting

__all__ = ["Baseline", "Drawn", "References", "as_references"]

NAMES = ("mean", "sample", "previous")


@dataclass
class Drawn:
    """One reference.

    Attributes:
        replaced: what takes the place of attributed values, of the same shapes.
        entries: what takes the place of entries that are read and not attributed.
    """

    replaced: dict[NestedKey, Tensor] = field(default_factory=dict)
    entries: dict[NestedKey, Tensor] = field(default_factory=dict)


class References:
    """What a difference is one from.

    Args:
        baseline: as :class:`~tdhook.attribution.lrp.LRP` takes it.
        samples: how many are drawn where ``"sample"`` is asked for.
        data: the rows that ``"mean"`` and ``"sample"`` are taken of; by default those of the batch.
        seed: of what is drawn.
    """

    def __init__(
        self,
        baseline: Baseline = "sample",
        samples: int = 1,
        data: TensorDictBase | None = None,
        seed: int = 0,
    ) -> None:
        if type(samples) is not int or samples < 1:
            raise ValueError(f"samples is how many references are drawn, at least one, got {samples!r}")
        self.baseline, self.samples, self.data, self.seed = baseline, samples, data, seed
        named = baseline.values() if isinstance(baseline, Mapping) else [baseline]
        if samples > 1 and not any(isinstance(given, str) and given == "sample" for given in named):
            raise ValueError(f'samples={samples} are drawn of data: give baseline="sample"')

    @property
    def constant(self) -> bool:
        """Whether the references are the same for each batch, as far as they are known beforehand."""
        named = self.baseline.values() if isinstance(self.baseline, Mapping) else [self.baseline]
        return not any(isinstance(given, str | tuple) or callable(given) for given in named)

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
        chance = torch.Generator().manual_seed(self.seed)
        return [self._one(values, batch_dims, td, chance) for _ in range(self.samples)]

    def _one(
        self,
        values: Mapping[NestedKey, Tensor],
        batch_dims: Mapping[NestedKey, int],
        td: TensorDictBase,
        chance: torch.Generator,
    ) -> Drawn:
        drawn = Drawn()
        keys = {_plain(key): key for key in values}
        for name, given in self._named(list(keys), td).items():
            if name in keys:
                key = keys[name]
                drawn.replaced[key] = self._made(given, name, values[key], batch_dims[key], td, chance)
            else:
                value = td.get(name)
                drawn.entries[name] = self._made(given, name, value, td.batch_dims, td, chance)
        return drawn

    def _named(self, keys: list[NestedKey], td: TensorDictBase) -> dict[NestedKey, OneBaseline]:
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
        chance: torch.Generator,
    ) -> Tensor:
        rows = value.reshape(-1, *value.shape[dims:])
        if isinstance(given, str | tuple) and not (isinstance(given, str) and given in NAMES):
            return _laid_out_as(value, _entry(cast(NestedKey, given), key, value, td))
        if given == "previous" if isinstance(given, str) else False:
            return previous(value, td)
        if isinstance(given, str):
            source = rows if self.data is None else self._rows(key, rows)
            if given == "mean":
                made = source.to(
                    torch.get_default_dtype() if not source.is_floating_point() else source.dtype
                )
                made = made.mean(0)
            else:
                index = torch.randint(len(source), (len(rows),), generator=chance)
                made = source[index.to(source.device)]
        else:
            made = given(rows) if callable(given) else torch.as_tensor(given)
            if made.dim() > 1 and made.shape == value.shape:
                made = made.reshape(rows.shape)  # a row each
        return _laid_out_as(value, fitting(made, key, rows).reshape(value.shape))

    def _rows(self, key: NestedKey, rows: Tensor) -> Tensor:
        assert self.data is not None
        if key not in self.data.keys(True):
            raise KeyError(f"the data that baselines are taken of have no {key!r}")
        found: Tensor = self.data.get(key)
        return found.reshape(-1, *rows.shape[1:])


def as_references(baseline: Baseline | References | None, samples: int) -> References | None:
    """What :class:`References` a baseline stands for: a TensorDict is data to draw from."""
    if baseline is None:
        if samples != 1:
            raise ValueError("samples says how many baselines are drawn: give baseline too")
        return None
    if isinstance(baseline, References):
        return baseline
    if isinstance(baseline, TensorDictBase):
        return References("sample", samples, baseline)
    return References(baseline, samples)


def _laid_out_as(value: Tensor, made: Tensor) -> Tensor:
    """With the strides of a value: a model may ask for these, as it does before it overwrites."""
    return made if made.stride() == value.stride() else torch.empty_like(value).copy_(made)


def _plain(key: NestedKey) -> NestedKey:
    return key[0] if isinstance(key, tuple) and len(key) == 1 else key


def _entry(name: NestedKey, key: NestedKey, value: Tensor, td: TensorDictBase) -> Tensor:
    """The baseline of a value that an entry of the TensorDict holds, under its own name or as it is."""
    under = unravel_key((*parts_of(name), *parts_of(key)))
    for candidate in (under, unravel_key(name)):
        if candidate in td.keys(True):
            return fitting(cast(Tensor, td.get(candidate)), key, value)
    raise KeyError(
        f"baseline {name!r} is neither {', '.join(map(repr, NAMES))} nor an entry of the TensorDict, which has "
        f"{', '.join(map(repr, td.keys(True, True)))}"
    )


def previous(value: Tensor, td: TensorDictBase) -> Tensor:
    """What a value was a step before, along the last axis of the batch; at the start of a trajectory what it is.

    Args:
        value: ``[*batch, time, *shape]``.
        td: of batch size ``[*batch, time]``; a step at which ``("next", "done")`` or ``"is_init"`` says that a
            trajectory ended, or begins, has none before it.

    Raises:
        ValueError: the batch has no axis.
    """
    axis = td.batch_dims - 1
    if axis < 0:
        raise ValueError(
            'baseline="previous" is the step before along the last axis of the batch, and there is none'
        )
    first = value.narrow(axis, 0, 1)
    before = torch.cat([first, value.narrow(axis, 0, value.shape[axis] - 1)], axis)
    begins = _begins(td)
    if begins is None:
        return before
    return torch.where(begins.reshape(begins.shape + (1,) * (value.dim() - begins.dim())), value, before)


def _begins(td: TensorDictBase) -> Tensor | None:
    """Which steps are the first of their trajectory, ``[*batch, time]``."""
    axis = td.batch_dims - 1
    begins: Tensor | None = td.get("is_init", None)
    if begins is not None:
        return begins.reshape(td.batch_size)
    done = td.get(("next", "done"), None)
    if done is None:
        return None
    done = done.reshape(*td.batch_size, -1).any(-1)
    return torch.cat(
        [torch.ones_like(done.narrow(axis, 0, 1)), done.narrow(axis, 0, done.shape[axis] - 1)], axis
    )
