"""autoLRP (Alasad 2026): rules on the nodes of the autograd graph.

Relevance starts from one, not from the value of the output.
"""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import rules_for
from benchmarks.timing import Contender


def contender(case: Case, device: str) -> Contender:
    from autolrp import BASE, LRPConfig, tensor

    alpha_beta = ("alpha_beta", {"alpha": 2.0, "beta": 1.0})
    config = rules_for(
        case,
        {
            "epsilon_plus": LRPConfig.composite(),
            "epsilon_alpha2_beta1": LRPConfig(rule={**BASE, "ConvolutionBackward": alpha_beta}, eps=1e-6),
            "attn_lrp": LRPConfig.attnlrp(),
        },
    )
    module = case.model(device, frozen=True).module

    def explain(td: TensorDict) -> Tensor:
        x = tensor(td["observation"])
        z = module(x)
        z.gather(-1, z.detach().argmax(-1, keepdim=True)).sum().lrp(config=config)
        relevance: Tensor = x.relevance
        return relevance.as_subclass(Tensor)

    return Contender(explain)
