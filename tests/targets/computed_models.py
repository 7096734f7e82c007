"""What the tests of computed targets share: models of logits and values, and what is expected of them.

Of a bias-free ReLU network, the epsilon rule with a vanishing epsilon gives gradient times input.
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP
from tdhook.rules import EpsilonRule, PassRule

EXACT = [(nn.Linear, EpsilonRule(1e-12)), (nn.ReLU, PassRule())]
FLOWS = pytest.mark.parametrize("flow", ["relevance", "gradient"])
BATCHES = pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
SUPPORT = torch.linspace(-2, 3, 6, dtype=torch.float64)
ATOMS, ACTIONS = 6, 4


def network(out, *last, bias=False):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8, bias=bias), nn.ReLU(), nn.Linear(8, out, bias=bias), *last).double()


def model_of(*keys, bias=False):
    """A network of each kind of output that is named."""
    kinds = {
        "logits": lambda: network(ACTIONS, bias=bias),
        "action_value": lambda: network(ACTIONS, bias=bias),
        "state_value": lambda: network(1, bias=bias),
        "loc": lambda: network(2, bias=bias),
        "scale": lambda: network(2, nn.Softplus(), bias=bias),
        "quantiles": lambda: network(ATOMS * ACTIONS, nn.Unflatten(-1, (ATOMS, ACTIONS)), bias=bias),
    }
    return TensorDictSequential(*(TensorDictModule(kinds[key](), ["obs"], [key]) for key in keys))


def observation(*batch, **entries):
    torch.manual_seed(2)
    entries.setdefault("action", torch.randint(ACTIONS, batch))
    return TensorDict(obs=torch.randn(*batch, 3).double(), **entries, batch_size=batch)


def explain(model, td, target, flow=None, composite=EXACT):
    method = LRP(composite, target=target, flow=flow, ledger=True, on_unmatched="raise")
    with method.prepare(model) as explained:
        td = explained(td.clone())
    assert (td["ledger", "gap"].abs() <= 1e-9 * td["ledger", "target"].abs().clamp(min=1e-3)).all()
    assert list(td.keys(True, True)) and set(explained.out_keys) <= set(td.keys(True, True))
    return td


def gradient_times_input(model, td, value):
    work = td.clone()
    x = work["obs"].requires_grad_()
    (g,) = torch.autograd.grad(value(model(work)).sum(), x)
    return (x * g).detach()


def taken(td, key="logits"):
    return lambda z: z[key].gather(-1, td["action"].unsqueeze(-1)).squeeze(-1)
