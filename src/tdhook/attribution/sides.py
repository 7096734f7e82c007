"""Sides: a clean and a corrupt batch in one, of which the model is run on either."""

from __future__ import annotations

from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor

from tdhook.keys import known_keys, under

__all__ = ["CLEAN", "CORRUPT", "SIDES", "sides"]

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
