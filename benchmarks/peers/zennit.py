"""zennit (Anders et al. 2021): hooks on modules; its context stays open, the largest output is explained."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.library_models import import_torchvision
from benchmarks.peers import rules_for
from benchmarks.timing import Contender


def contender(case: Case, device: str) -> Contender:
    import_torchvision()  # which zennit imports
    from zennit import canonizers, composites, torchvision

    composite = rules_for(
        case,
        {
            "epsilon_plus": composites.EpsilonPlus,
            "epsilon_alpha2_beta1": composites.EpsilonAlpha2Beta1,
        },
    )
    module = case.model(device, frozen=True).module
    merged: list[object] = []
    if type(module).__name__ == "ResNet":
        merged = [torchvision.ResNetCanonizer()]
    elif any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
        merged = [canonizers.SequentialMergeBatchNorm()]
    composite(canonizers=merged).register(module)

    def explain(td: TensorDict) -> Tensor:
        x = td["observation"].detach().requires_grad_()
        z = module(x)
        seed = torch.zeros_like(z)
        largest = z.detach().max(-1, keepdim=True)
        seed.scatter_(-1, largest.indices, largest.values)
        (relevance,) = torch.autograd.grad(z, x, seed)
        return relevance

    return Contender(explain)
