"""Pairs of calls, and what each input counts by an integral that is written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.relevance.secants.pair import Pair
from tdhook.tape.trees import tree_flatten, tree_leaves


def pair_of(
    name: str,
    function: Callable[..., Any],
    ends: Sequence[Any],
    starts: Sequence[Any],
    live: Sequence[int] | None = None,
    module: nn.Module | None = None,
    **kwargs: Any,
) -> Pair:
    """A call of ``function`` on ``ends``, and one on ``starts``; what is not ``live`` may differ beside."""
    leaves, spec = tree_flatten((tuple(ends), kwargs))
    before, _ = tree_flatten((tuple(starts), kwargs))
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    live = [i for i in tensors if leaves[i].is_floating_point()] if live is None else list(live)
    beside = {i: before[i] for i in tensors if i not in live and before[i] is not leaves[i]}
    with torch.no_grad():
        made, there = (tree_leaves(function(*args, **kwargs)) for args in (ends, starts))
    return Pair(
        name,
        module,
        function,
        leaves,
        spec,
        tuple(live),
        tuple(leaves[i] for i in live),
        tuple(before[i] for i in live),
        tuple(made),
        tuple(there),
        beside,
    )


def random_grads(pair: Pair) -> list[Tensor]:
    return [torch.randn_like(z) if z.is_floating_point() else torch.zeros_like(z) for z in pair.outputs]


def integrated(pair: Pair, grads: Sequence[Tensor], pieces: int = 4000) -> list[Tensor]:
    """The vector-Jacobian product at the middle of each of many pieces of the way, averaged."""
    total = [torch.zeros_like(x) for x in pair.ends]
    for piece in range(pieces):
        place = (piece + 0.5) / pieces
        inputs = [(s + place * (x - s)).requires_grad_() for s, x in zip(pair.starts, pair.ends, strict=True)]
        outputs = pair.run(inputs)
        kept = [(z, g) for z, g in zip(outputs, grads, strict=True) if z.requires_grad]
        found = torch.autograd.grad(
            [z for z, _ in kept], inputs, [g for _, g in kept], allow_unused=True, materialize_grads=True
        )
        total = [t + g / pieces for t, g in zip(total, found, strict=True)]
    return total


def assert_all_arrives(
    pair: Pair, grads: Sequence[Tensor], found: Sequence[Tensor | None], tolerance: float = 1e-12
) -> None:
    """Over the differences of the inputs, shares sum to what the difference of the outputs counts."""
    wanted = sum((g * d)[d != 0].sum() for g, d in zip(grads, pair.rises, strict=True))
    made = sum((g * d)[d != 0].sum() for g, d in zip(found, pair.steps, strict=True) if g is not None)
    size = sum((g * d)[d != 0].abs().sum() for g, d in zip(grads, pair.rises, strict=True))
    assert abs(float(made - wanted)) <= tolerance * max(1.0, float(size)), (float(made), float(wanted))
