"""Sharded tensors, in a world of one process: the two that share one are tested with the models that they run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn.parallel._functions import Scatter

from tdhook.tape.functions import Identity
from tdhook.tape.sharded import (
    added_up,
    gathered,
    is_sharded,
    moves_between_processes,
    replicated,
    spread_of,
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sums_that_are_spread_are_added_up(mesh: DeviceMesh) -> None:
    x = torch.randn(3, 4)
    spread = DTensor.from_local(x, mesh, [Partial()])
    assert added_up(x) is x
    assert not added_up(spread).placements[0].is_partial()
    sharded = DTensor.from_local(x, mesh, [Shard(0)])
    assert added_up(sharded) is sharded
    assert is_sharded(sharded) and not is_sharded(x)


def test_the_same_in_all_processes(mesh: DeviceMesh) -> None:
    x = torch.randn(3, 4)
    like = DTensor.from_local(x, mesh, [Shard(1)])
    assert replicated(x, x) is x and replicated(like, like) is like
    assert replicated(x, like).placements[0].is_replicate()


def test_parts_are_gathered(mesh: DeviceMesh) -> None:
    x = torch.randn(3, 4)
    assert gathered(x) is x
    assert torch.equal(gathered(DTensor.from_local(x, mesh, [Shard(1)])), x)
    assert torch.equal(gathered(x, ((mesh, 0),)), x)
    assert gathered(x.sum(), ((mesh, 0),)).shape == (1,)


def test_how_a_plain_tensor_is_spread_follows_from_what_it_was_computed_of(mesh: DeviceMesh) -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    part = DTensor.from_local(leaf, mesh, [Shard(1)]).to_local()
    known: dict[object, object] = {}
    assert spread_of([leaf * 2], known) == ()
    assert spread_of([leaf * 2, (part.exp() + leaf).sum(0)], known) == ((mesh, 0),)
    again = DTensor.from_local(part, mesh, [Shard(1)]).full_tensor()
    assert spread_of([again], known) == ()


def test_what_moves_values_between_processes() -> None:
    assert moves_between_processes(Scatter)
    assert not moves_between_processes(Identity)
    ours, theirs = partial(added_up), partial(partial(Scatter.forward), None)
    assert moves_between_processes(theirs) and moves_between_processes(Scatter.apply.__self__.forward)
    assert not moves_between_processes(ours) and not moves_between_processes(lambda grad: grad)
