"""Compiled equals eager, for every rule: `torch.compile` can drop a custom backward pass without a word.

Graph breaks are allowed here: rules are not traced into one graph yet.
"""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target, preset
from tdhook.attribution.lrp_helpers import rules as r
from tdhook.attribution.lrp_helpers.layers import Sum

# Dynamo resumes after a graph break with tensors that it rebuilds, whose `.grad` it asks for.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # Dynamo makes an instance of a function to trace it.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

FEATURES = 6


def dense(middle=None):
    return nn.Sequential(nn.Linear(FEATURES, 9), middle or nn.ReLU(), nn.Linear(9, 3)).double()


def image():
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, 3)).double().eval()


def square(module):
    return [(nn.Linear, module)]


CASES = {
    "epsilon": (square(r.EpsilonRule(1e-3)), dense),
    "epsilon without bias": (square(r.EpsilonRule(zero_params="bias")), dense),
    "uniform epsilon": (square(r.UniformEpsilonRule()), dense),
    "gamma": (square(r.GammaRule()), dense),
    "alpha-beta": (square(r.AlphaBetaRule()), dense),
    "z-plus": (square(r.ZPlusRule()), dense),
    "z-box": (square(r.ZBoxRule(-4.0, 4.0)), dense),
    "w-square": (square(r.WSquareRule()), dense),
    "flat": (square(r.FlatRule()), dense),
    "stop": ([(nn.Tanh, r.StopRule()), (nn.Linear, r.EpsilonRule())], lambda: dense(nn.Tanh())),
    "pass": ([(nn.Tanh, r.PassRule()), (nn.Linear, r.EpsilonRule())], lambda: dense(nn.Tanh())),
    "uniform": ([(nn.Tanh, r.UniformRule()), (nn.Linear, r.EpsilonRule())], lambda: dense(nn.Tanh())),
    "pseudo-identity": ([(nn.GELU, r.PseudoIdentityRule())], lambda: dense(nn.GELU())),
    "layer norm": ([(nn.LayerNorm, r.LayerNormRule())], lambda: dense(nn.LayerNorm(9))),
    "packed projection": ([(nn.Linear, r.AHQKVRule())], lambda: nn.Linear(FEATURES, 9).double()),
    "softmax": (
        [(nn.Softmax, r.SoftmaxEpsilonRule()), (nn.Linear, r.EpsilonRule())],
        lambda: dense(nn.Softmax(-1)),
    ),
    "norm": ([(Sum, r.NormRule())], lambda: nn.Sequential(nn.Unflatten(-1, (3, 2)), Sum(-1))),
    "deconvnet": (preset("deconvnet"), dense),
    "guided backpropagation": (preset("guided_backprop"), dense),
    "beta-smooth": (preset("beta_smooth"), dense),
    "epsilon_plus on images": (preset("epsilon_plus"), image),
    "epsilon_alpha2_beta1_flat on images": (preset("epsilon_alpha2_beta1_flat"), image),
    "epsilon_gamma_box on images": (preset("epsilon_gamma_box", low=-4.0, high=4.0), image),
}


def explain(module, net, shape):
    torch.manual_seed(3)
    x = torch.randn(5, *shape, dtype=torch.float64)
    return module(TensorDict({"input": x}, batch_size=[5]))["attr", "input"]


@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager(name):
    composite, make = CASES[name]
    net = make()
    shape = (2, 8, 8) if make is image else (FEATURES,)
    explained = LRP(composite, target=Target("output", "argmax")).wrap(net)
    eager = explain(explained, net, shape)
    plain_gradient = LRP(target=Target("output", "argmax"), warn_on_missing_rule=False).wrap(net)
    if not isinstance(net[-1] if isinstance(net, nn.Sequential) else net, Sum):
        assert not torch.allclose(explain(plain_gradient, net, shape), eager)
    torch._dynamo.reset()
    compiled = torch.compile(explained, backend="aot_eager")
    torch.testing.assert_close(explain(compiled, net, shape), eager, rtol=1e-12, atol=1e-12)


def test_the_default_backend_too():
    explained = LRP("epsilon_plus", target=Target("output", "argmax")).wrap(dense())
    torch._dynamo.reset()
    compiled = torch.compile(explained)
    torch.testing.assert_close(explain(compiled, None, (FEATURES,)), explain(explained, None, (FEATURES,)))
