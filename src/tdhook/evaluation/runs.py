"""Running a model again and again on changed inputs, while what is asked of it stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.contexts.attribution import Attribution
from tdhook.keys import ASKED
from tdhook.models.state import restored
from tdhook.tape.undoing import Undoing
from tdhook.targets import AtStep, TargetLike

__all__ = [
    "Explainer",
    "Method",
    "axes_of",
    "bound",
    "normal",
    "quiet",
    "relevance_of",
    "target_of",
]

Explainer: TypeAlias = Callable[[TensorDictBase], TensorDictBase]
"""Writes the relevance of ``key`` under ``("attr", key)`` into a TensorDict."""

Method: TypeAlias = "Attribution | Callable[[nn.Module], Explainer]"
"""An attribution method (``LRP(...)``, ``Gradient()``), or a function that makes an explainer of a model.

What a method explains is given with ``target``; a function decides that by itself.
"""


@contextmanager
def quiet(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run ``model`` without gradients, with the most likely actions, and leave buffers and random state as they were.

    Within, global random numbers (dropout in training mode) follow ``seed``.
    """
    deterministic = set_interaction_type(InteractionType.DETERMINISTIC)
    with Undoing(), torch.no_grad(), restored(model), deterministic:
        seed_globally(seed)
        yield


def seed_globally(seed: int) -> None:
    """Seed the generators whose state :func:`quiet` puts back."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def normal(shape: Sequence[int], chance: torch.Generator) -> Tensor:
    """Normal numbers in double precision, the same ones in however many parts they are drawn."""
    even = torch.rand((*shape,), generator=chance, dtype=torch.float64)
    found: Tensor = torch.special.ndtri(even.clamp(min=1e-12))
    return found


def axes_of(td: TensorDictBase, batch_dims: int | None, target: TargetLike) -> int:
    """How many batch axes tell apart what is explained: all, by default, or all but time where one step is explained.

    Raises:
        ValueError: there is nothing in ``td``, or it does not have so many axes.
    """
    if batch_dims is None:
        batch_dims = td.batch_dims - isinstance(target, AtStep)
    if not 0 <= batch_dims <= td.batch_dims:
        raise ValueError(
            f"batch_dims={batch_dims} of a TensorDict of batch size {list(td.batch_size)}: give 0 to {td.batch_dims}"
        )
    if 0 in td.batch_size:
        raise ValueError(
            f"there is nothing to evaluate: the TensorDict is empty (batch size {list(td.batch_size)})"
        )
    return batch_dims


def bound(
    method: Method, module: nn.Module, target: TargetLike, whole: TensorDictBase | None = None
) -> Explainer:
    """An explainer of ``module`` by ``method``, for ``target``.

    Args:
        method: how.
        module: the model.
        target: what is explained.
        whole: all that will be explained, a part at a time: what its parts are compared with is all of it.
    """
    if isinstance(method, Attribution):
        method = method if whole is None else method.among(whole)
        return (method if target is None else method.explaining(target)).wrap(module)
    explain = method(module)

    def with_gradients(td: TensorDictBase) -> TensorDictBase:
        with torch.enable_grad():
            return explain(td)

    return with_gradients


def target_of(method: Method | None, target: TargetLike) -> TargetLike:
    """What is explained: ``target``, or else what ``method`` says."""
    return getattr(method, "target", None) if target is None else target


def relevance_of(td: TensorDictBase, attribution_key: NestedKey) -> dict[NestedKey, Tensor]:
    """The relevance that is written in ``td``, by the key that it belongs to.

    Raises:
        KeyError: there is none.
    """
    below = td.get(attribution_key, None)
    if not isinstance(below, TensorDictBase):
        known = ", ".join(sorted(map(str, td.exclude(ASKED).keys(True, True))))
        raise KeyError(
            f"there is no relevance under {attribution_key!r}; the TensorDict has {known}. Explain it first, or give "
            "a method"
        )
    return dict(below.items(True, True))
