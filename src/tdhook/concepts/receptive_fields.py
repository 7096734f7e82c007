"""Receptive fields: which part of an input a place in a layer depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.attribution.gradient import Gradient
from tdhook.concepts.reading import path_of, written_at
from tdhook.conventions import Convention
from tdhook.keys import under
from tdhook.models.model import InKeys
from tdhook.targets.base import Seeder, Seeds
from tdhook.targets.outputs import output_of, seed_of

__all__ = ["AtPlace", "box_of", "on_device_of", "receptive_fields"]

_DRAWS = 12
"""Inputs that are looked at beside the one that is given: gates that are shut in one are open in another."""
_ENTRY = "_place"


@dataclass(frozen=True)
class AtPlace(Seeder):
    """One value of a layer, whose place an entry of the batch says.

    Attributes:
        key: what is written, or a module of ``target_modules``, ``("path",)``.
        entry: the place of each element among its features, one after the other, ``[*batch]``; ``-1`` for none.
    """

    key: NestedKey
    entry: NestedKey

    @property
    def entries(self) -> Sequence[NestedKey]:
        """The places."""
        return (self.entry,)

    @property
    def explains(self) -> Sequence[NestedKey]:
        """The key."""
        return (self.key,)

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds."""
        z = output_of(outputs, self.key)
        lead = outputs.batch_dims
        place = inputs.get(self.entry).to(z.device).unsqueeze(-1)
        chosen = torch.zeros(*z.shape[:lead], z.shape[lead:].numel(), dtype=torch.bool, device=z.device)
        chosen = chosen.scatter_(-1, place.clamp(min=0), place >= 0).reshape(z.shape)
        return Seeds([self.key], [z], [seed_of(z, chosen, flow)])


def receptive_fields(
    policy: nn.Module,
    layer: NestedKey,
    td: TensorDictBase,
    place: Tensor,
    *,
    is_module: bool = True,
    in_keys: InKeys | None = None,
    out_keys: Sequence[NestedKey] | None = None,
    at_once: int | None = None,
    draws: int = _DRAWS,
    seed: int = 0,
) -> TensorDict:
    """Where the input can change a value inside the model: where its gradient is not zero.

    Nothing is assumed of the model. A gate that is shut, or a maximum that is taken elsewhere, hides an input, so that
    inputs with noise are looked at, too, and what is found is what the value depends on in any of them.

    Args:
        policy: the model.
        layer: the path of a module, or a key that is written.
        td: inputs, ``[rows]``, or trajectories, ``[rows, time]``.
        place: that of the value of each row, counted through all features of the layer, ``[rows]``; of trajectories
            ``[rows, time]``, ``-1`` where no value is looked at.
        is_module: whether the layer is a module.
        in_keys: as in ``method.wrap``.
        out_keys: as there.
        at_once: how many rows are looked at in one pass; by default all.
        draws: how many inputs with noise are looked at: as large as the values of the input spread, and each time twice
            as large, which opens what the data never do; of integers, others between the least and the largest.
        seed: of the noise.

    Returns:
        By input, truth values ``[rows, *features]``, or ``[rows, time, *features]``.
    """
    key = (str(written_at(layer)),) if is_module else layer
    modules = [path_of(str(layer))] if is_module else None
    method = Gradient(AtPlace(key, _ENTRY), signed=True, target_modules=modules)
    explained = method.wrap(policy, in_keys, out_keys)
    td, place = on_device_of(policy, td), place.reshape(td.batch_size)
    chance = torch.Generator().manual_seed(seed)
    found: dict[NestedKey, Tensor] = {}
    for draw in range(draws + 1):
        here = td.select(*explained.reads(td), strict=False).copy()
        here.set(_ENTRY, place.to(here.device) if here.device is not None else place)
        for one in found:
            here.set(one, _other(td.get(one), draw, chance))
        rows = here.split(len(here) if at_once is None else at_once)
        whole = [explained(some).select("attr", strict=False) for some in rows]
        for one in (
            found if draw else [key for key in explained.attributed if _has(whole[0], under("attr", key))]
        ):
            depends = torch.cat([some.get(under("attr", one)) for some in whole]) != 0
            found[one] = found[one] | depends if draw else depends
    return TensorDict({unravel_key(one): value.cpu() for one, value in found.items()}, td.batch_size)


def on_device_of(policy: nn.Module, td: TensorDictBase) -> TensorDictBase:
    """A batch where the policy is."""
    weight = next(policy.parameters(), None)
    return td if weight is None else td.to(weight.device)


def _has(td: TensorDictBase, key: NestedKey) -> bool:
    return isinstance(td.get(key, None), Tensor)


def _other(value: Tensor, draw: int, chance: torch.Generator) -> Tensor:
    """A value with noise; of integers, which may be indices too, others between the least and the largest."""
    if not value.is_floating_point():
        least, most = int(value.min()), int(value.max())
        return torch.randint(least, most + 1, value.shape, generator=chance).to(value)
    noise = torch.randn(value.shape, generator=chance).to(value)
    size: Tensor = value.std(correction=0).clamp(min=1e-3) * 2 ** (draw - 1)
    return value + noise * size


def box_of(depends: Tensor) -> Tensor:
    """The box around what is true, ``[rows, 2, axes]``: along each axis the first place, and that after the last.

    Args:
        depends: ``[rows, *features]``; a row without any is in the box of all of it.
    """
    depends = depends | ~depends.reshape(len(depends), -1).any(-1).reshape(-1, *(1,) * (depends.dim() - 1))
    ends = []
    for axis in range(1, depends.dim()):
        others = [other for other in range(1, depends.dim()) if other != axis]
        along = (depends.any(others) if others else depends).to(torch.uint8)
        first, last = along.argmax(-1), along.shape[-1] - along.flip(-1).argmax(-1)
        ends.append(torch.stack([first, last], -1))
    return torch.stack(ends, -1)
