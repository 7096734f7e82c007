"""Sharded tensors: what several processes hold together, each a part of it.

torch's name for them is ``DTensor``; tensor parallelism computes with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from tdhook.tape.internals import maker_of

__all__ = [
    "Spread",
    "added_up",
    "gathered",
    "is_sharded",
    "moves_between_processes",
    "replicated",
    "spread_of",
]

Spread: TypeAlias = "tuple[tuple[DeviceMesh, int], ...]"
"""The axes of a mesh of processes along which a plain tensor is a part of a larger one: ``(mesh, axis)``."""

# Where torch has the functions that bring values, or parts of them, from one process or device to another.
_PLUMBING = ("torch.distributed.tensor.", "torch.distributed.fsdp.", "torch.nn.parallel.")


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is held by several processes together."""
    return type(x) is not Tensor and isinstance(x, DTensor)


def added_up(x: Tensor) -> Tensor:
    """A tensor whose summands are spread over processes, added up; any other as it is.

    What is not linear in a value, such as a stabiliser, must be given the sum.
    """
    if type(x) is Tensor or not isinstance(x, DTensor):
        return x
    if not any(placement.is_partial() for placement in x.placements):
        return x
    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def replicated(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that is the same in all processes, in the form of ``like``."""
    if is_sharded(x) or not isinstance(like, DTensor):
        return x
    mesh = like.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def gathered(x: Tensor, spread: Spread = ()) -> Tensor:
    """All of a tensor of which each process holds a part.

    Args:
        x: of any shape.
        spread: how it is spread over processes, if it is a plain tensor; its parts are then put one behind the other
            along the last axis.
    """
    if isinstance(x, DTensor):
        return x.full_tensor()
    for mesh, axis in spread:
        group = mesh.get_group(axis)
        part = x.reshape(1) if x.dim() == 0 else x
        most = torch.tensor(part.shape[-1], device=part.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
        # Parts need not be of the same size; zeros are no relevance.
        filled = torch.nn.functional.pad(part, (0, int(most) - part.shape[-1])).contiguous()
        parts = [torch.empty_like(filled) for _ in range(mesh.size(axis))]
        dist.all_gather(parts, filled, group)
        x = torch.cat(parts, -1)
    return x


def spread_of(tensors: Iterable[Tensor], known: dict[object, Spread]) -> Spread:
    """How plain tensors on the tape are spread over processes: as the sharded one that they were computed from.

    Args:
        tensors: the tensors.
        known: what is known of the nodes of the tape, and comes to be known here.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ()
    for x in tensors:
        if not is_sharded(x) and (found := _spread_at(x.grad_fn, known)):
            return found
    return ()


def _spread_at(node: Any, known: dict[object, Spread]) -> Spread:
    ahead = [node]
    while ahead:
        now = ahead[-1]
        if now is None or now in known:
            ahead.pop()
            continue
        shards = getattr(now, "dtensor_spec", None)
        if shards is not None:
            placed = enumerate(shards.placements)
            known[now] = tuple((shards.mesh, axis) for axis, p in placed if p.is_shard())
            continue
        before = [] if _makes_sharded(now) else [n for n, _ in now.next_functions if n is not None]
        unknown = [n for n in before if n not in known]
        ahead += unknown
        if not unknown:
            known[now] = next((found for n in before if (found := known[n])), ())
    return known.get(node, ())


def _makes_sharded(node: object) -> bool:
    made = maker_of(node)
    return made is not None and made.__name__ == "_FromTorchTensor"


def moves_between_processes(function: Any) -> bool:
    """Whether an autograd function, or a hook, is one of torch's that move values between processes, or devices."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", None)).startswith(_PLUMBING)
