"""Sides: a clean and a corrupt batch in one, the runs on either, and effects by how far one is from the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.keys import known_keys, under
from tdhook.models.capture import module_path
from tdhook.tape.axes import beside

__all__ = ["CLEAN", "CORRUPT", "SIDES", "mixed_by_share", "require_alike", "sides"]

CLEAN, CORRUPT = SIDES = ("clean", "corrupt")


def sides(td: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
    """The clean batch and the corrupt one, ``[*batch]``.

    What lies under ``"clean"`` and ``"corrupt"`` lies there at its own key, beside what is the same in both.

    Raises:
        KeyError: there is nothing under either, or an entry is in one of them and nowhere else.
        ValueError: an entry has other shapes in them.
    """
    own = {side: td.get(side, None) for side in SIDES}
    for side, found in own.items():
        if not is_tensor_collection(found):
            raise KeyError(
                f"key {side!r} is missing from the TensorDict, which has {known_keys(td)}: what the model reads at "
                f"`key` lies at ('clean', key) and at ('corrupt', key), or at `key` where it is the same in both"
            )
    around = td.exclude(*SIDES)
    found = [around.copy().update(own[side]) for side in SIDES]
    clean, corrupt = (dict(one.items(True, True)) for one in found)
    for side, here, there in ((CORRUPT, clean, corrupt), (CLEAN, corrupt, clean)):
        for key in here:
            if key not in there:
                raise KeyError(
                    f"key {under(side, key)!r} is missing from the TensorDict, which has {known_keys(td)}: an entry "
                    "lies under 'clean' and under 'corrupt', or at its own key where it is the same in both"
                )
    for key, x in clean.items():
        if isinstance(x, Tensor) and x.shape != corrupt[key].shape:
            raise ValueError(
                f"entry {key!r} has the shape {list(x.shape)} in the clean batch and {list(corrupt[key].shape)} in the "
                "corrupt one: one is put in the place of the other, so choose or pad them to be of one shape"
            )
    return found[0], found[1]


def require_alike(there: Mapping[NestedKey, Tensor], here: Mapping[NestedKey, Tensor]) -> None:
    """The values of one run can take the place of those of the other."""
    if there.keys() != here.keys():
        only = next(key for key in (*there, *here) if not (key in there and key in here))
        name = module_path(_name(only))
        raise ValueError(
            f"{name!r} was not run as often in the clean run as in the corrupt one, so that nothing can be patched "
            f"there: leave out {name!r}"
        )
    for key, x in there.items():
        if x.shape != here[key].shape:
            raise ValueError(
                f"{_name(key)!r} has the shape {list(x.shape)} in one run and {list(here[key].shape)} in the other: "
                "one is put in the place of the other, so choose or pad inputs to be of one length"
            )


def mixed_by_share(small: Tensor, large: Tensor, change: Tensor) -> Tensor:
    """From effects as of small changes to those as of all of it, by the share of each in the change of the target.

    Args:
        small: ``[*batch, *parts]`` or ``[*batch, outputs, *parts]``.
        large: of the same shape.
        change: ``[*batch]`` or ``[*batch, outputs]``.
    """
    change = beside(change, large)
    share = torch.where(large == 0, 0.0, (large / change).abs().clamp(max=1.0))
    return torch.lerp(small, large, share)


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else key[0]
