"""Lazy layers: the first call of an explained module makes them, as the first call of the model would."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import MLP, ConvNet, MultiAgentMLP

from tdhook import LRP, Target
from tdhook.attribution import Gradient, IntegratedGradients


def perceptron():
    return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))


def convolutions():
    return nn.Sequential(
        nn.LazyConv2d(3, 2), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(-3), nn.LazyLinear(2)
    )


def dropping():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(8), nn.Dropout(0.5), nn.Linear(8, 2))


def torchrl_convolutions():
    return nn.Sequential(
        ConvNet(num_cells=[4, 4], kernel_sizes=2, strides=1), MLP(out_features=2, num_cells=[8])
    )


def agents():
    return MultiAgentMLP(None, 2, 3, centralized=False, share_params=True, depth=1, num_cells=8)


CASES = [
    (perceptron, (5, 4)),
    (convolutions, (5, 1, 4, 4)),
    (dropping, (5, 4)),
    (lambda: MLP(out_features=2, num_cells=[8]), (5, 4)),
    (torchrl_convolutions, (5, 3, 8, 8)),
    (agents, (5, 3, 4)),
]


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus_flat"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make, shape", CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_the_first_call_is_that_of_the_model(make, shape, training, composite):
    """Parameters, statistics, what is drawn and the state of the random numbers are those of the plain model."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    torch.manual_seed(1)
    plain = make().train(training)
    output = plain(x)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    model = make().train(training)
    td = LRP(composite, target=Target("output", 0), ledger=True).wrap(model)(TensorDict({"input": x}, [5]))
    assert torch.equal(torch.rand(1), drawn)
    torch.testing.assert_close(td["output"], output)
    assert list(model.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert td["ledger", "gap"].abs().max() < 1e-5
    if not training:
        again = LRP(composite, target=Target("output", 0)).wrap(plain)(TensorDict({"input": x}, [5]))
        torch.testing.assert_close(td["attr", "input"], again["attr", "input"])


@pytest.mark.parametrize("method", [Gradient, IntegratedGradients])
def test_other_methods(method):
    td = method(target=Target("output", 0)).wrap(perceptron())(TensorDict({"input": torch.ones(5, 4)}, [5]))
    assert td["attr", "input"].shape == (5, 4)


def test_layers_that_were_made_since():
    torch.manual_seed(0)
    model, td = perceptron(), TensorDict({"input": torch.ones(5, 4)}, [5])
    explained = LRP("epsilon_plus_flat", target="output").wrap(model)
    model(td["input"])
    expected = LRP("epsilon_plus_flat", target="output").wrap(model)(td.copy())
    assert torch.equal(explained(td)["attr", "input"], expected["attr", "input"])


class HalfUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.LazyLinear(2), nn.LazyLinear(3)

    def forward(self, x):
        return self.used(x)


def test_layers_that_do_not_run_stay_lazy():
    model, td = HalfUsed(), TensorDict({"input": torch.ones(5, 4)}, [5])
    explained = LRP("epsilon", target="output").wrap(model)
    assert explained(td)["attr", "input"].shape == explained(td)["attr", "input"].shape == (5, 4)
    assert isinstance(model.unused, nn.LazyLinear)
    assert model.unused(td["input"]).shape == (5, 3)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_does_not_run_is_left_to_be_trained():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        LRP("epsilon", target="output").wrap(model)(TensorDict({"input": torch.ones(5, 4)}, [5]))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plan_with_input_makes_them():
    plan = LRP("epsilon_plus_flat", target="output").plan(
        perceptron(), TensorDict({"input": torch.ones(5, 4)}, [5])
    )
    assert [type(row.module) for row in plan] == [nn.Linear, nn.ReLU, nn.Linear]


def test_compiled():
    td = TensorDict({"input": torch.ones(5, 4)}, [5])
    compiled = LRP("epsilon", target="output", compile={"backend": "eager"}).wrap(perceptron())
    assert compiled(td)["attr", "input"].shape == (5, 4)
