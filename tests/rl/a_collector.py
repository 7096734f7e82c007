"""``python a_collector.py KIND`` collects with an explained policy in processes of torchrl's, and checks each batch.

In a process of its own, as these collectors make a process group of the one that they are made in.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from collected import ATTR, cartpole, close, collecting, explain, q_actor, recomputed, within
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors.distributed import DistributedCollector, RPCCollector

KINDS = {
    "together": (DistributedCollector, {"sync": True, "backend": "gloo"}),
    "apart": (DistributedCollector, {"sync": False, "backend": "gloo"}),
    "remote": (RPCCollector, {"sync": True}),
}


def options_of(frames: int, total: int) -> dict[str, Any]:
    """Frames, and what goes to each collector."""
    given = collecting(frames, total)
    name = "auto_register_policy_transforms"
    each = {name: given.pop(name)}
    return {**given, "collector_kwargs": each}


def stepped(actor: nn.Module, batch: TensorDictBase) -> None:
    """Change the weights by far."""
    optimiser = torch.optim.SGD(actor.parameters(), lr=1.0)
    found = actor(batch.select("observation").reshape(-1))["action_value"]
    ((found * batch["action"].reshape(-1, 2)).sum(-1) - 5.0).square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()


def explained_by(versions: list[nn.Module], batch: TensorDictBase) -> list[float]:
    """Which share of the steps has the relevance of each of these actors."""
    flat = batch.reshape(-1)
    return [close(flat[ATTR], recomputed(one, flat)).double().mean().item() for one in versions]


def followed(collector: Any, actor: nn.Module) -> list[list[float]]:
    """Train while it collects; of each batch, which share has the relevance of which weights."""
    versions, shares = [copy.deepcopy(actor)], []
    try:
        for batch in collector:
            shares.append(explained_by(versions, batch))
            stepped(actor, batch)
            versions.append(copy.deepcopy(actor))
            collector.update_policy_weights_()
    finally:
        collector.shutdown()
    return shares


if __name__ == "__main__":
    made, special = KINDS[sys.argv[1]]
    net = q_actor()
    with within(240):
        found = followed(
            made([cartpole, cartpole], explain(net), launcher="mp", **special, **options_of(40, 160)), net
        )
    sys.stdout.write(f"\nshares: {found}\n")
