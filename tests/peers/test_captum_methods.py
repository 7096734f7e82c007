"""Methods that average, layers and guided gradients give captum's numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import Gradient, IntegratedGradients
from tdhook.attribution.averaged import Averaged
from tdhook.attribution.cam import GradCAM
from tdhook.attribution.conductance import Conductance, InternalInfluence
from tdhook.attribution.expected_gradients import ExpectedGradients
from tdhook.attribution.guided import Deconvnet, GuidedBackprop
from tdhook.attribution.product import Product
from tdhook.perturbing.draws import Noise

captum = pytest.importorskip("captum.attr", reason="captum is not installed; `nox -s peers` installs it")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU"),
]
TARGET = Target("output", 1)


def smooth() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 3)
    ).double()


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 64, 3),
    ).double()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-9)


RULES = {
    "gausslegendre": "gauss_legendre",
    "riemann_left": "left",
    "riemann_middle": "middle",
    "riemann_right": "right",
    "riemann_trapezoid": "trapezoid",
}


@pytest.mark.parametrize("theirs, rule", RULES.items(), ids=RULES.values())
def test_each_quadrature(theirs: str, rule: str) -> None:
    net, x, steps = smooth(), torch.randn(5, 6).double(), 12
    found = IntegratedGradients(TARGET, steps=steps, rule=rule).wrap(net)(TensorDict({"input": x}, [5]))
    expected = captum.IntegratedGradients(net).attribute(x, target=1, n_steps=steps, method=theirs)
    if rule == "trapezoid":  # the weights of captum's sum to (n - 1) / n, ours to one
        expected = expected * steps / (steps - 1)
    close(found["attr", "input"], expected)


@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam(relu: bool) -> None:
    net, x = cnn(), torch.rand(4, 3, 24, 24).double()
    found = GradCAM("3", TARGET, relu=relu).wrap(net)(TensorDict({"input": x}, [4]))
    expected = captum.LayerGradCam(net, net[3]).attribute(x, target=1, relu_attributions=relu)
    seen = found["attr", "3"].sum(1, keepdim=True)
    close(seen.clamp(min=0) if relu else seen, expected)
    large = F.interpolate(expected, (24, 24), mode="bilinear")
    close(found["attr", "input"], large.expand(-1, 3, -1, -1))


GUIDED = {"guided": (GuidedBackprop, "GuidedBackprop"), "deconvnet": (Deconvnet, "Deconvolution")}


@pytest.mark.parametrize("method, theirs", GUIDED.values(), ids=GUIDED)
def test_guided_gradients(method: Callable[..., GuidedBackprop], theirs: str) -> None:
    net, x = cnn(), torch.rand(4, 3, 24, 24).double()
    found = method(TARGET).wrap(net)(TensorDict({"input": x}, [4]))
    expected = getattr(captum, theirs)(net).attribute(x.clone().requires_grad_(), target=1)
    close(found["attr", "input"], expected)


def test_guided_grad_cam() -> None:
    """Captum resizes by repeating."""
    net, x = cnn(), torch.rand(4, 3, 24, 24).double()
    method = Product(GradCAM("3", TARGET, smooth=False), GuidedBackprop())
    found = method.wrap(net)(TensorDict({"input": x}, [4]))
    expected = captum.GuidedGradCam(net, net[3]).attribute(x.clone().requires_grad_(), target=1)
    close(found["attr", "input"], expected)


def test_internal_influence() -> None:
    net, x = smooth(), torch.randn(5, 6).double()
    found = InternalInfluence(TARGET, input_modules=["1"], steps=16).wrap(net)(TensorDict({"input": x}, [5]))
    close(found["attr", "1"], captum.InternalInfluence(net, net[1]).attribute(x, target=1, n_steps=16))


def test_conductance() -> None:
    """Two quadratures of the same integral: both have to be fine."""
    net, x = smooth(), torch.randn(5, 6).double()
    found = Conductance(TARGET, input_modules=["1"], steps=4000).wrap(net)(TensorDict({"input": x}, [5]))
    theirs = captum.LayerConductance(net, net[1]).attribute(
        x, target=1, n_steps=4001, method="riemann_trapezoid"
    )
    torch.testing.assert_close(found["attr", "1"], theirs.detach() * 4001 / 4000, rtol=1e-3, atol=1e-5)
    whole = captum.IntegratedGradients(net).attribute(x, target=1, n_steps=64)
    torch.testing.assert_close(found["attr", "input"], whole, rtol=1e-6, atol=1e-7)


KINDS = {"smoothgrad": "mean", "smoothgrad_sq": "squares", "vargrad": "variance"}


@pytest.mark.parametrize("kind, of", KINDS.items(), ids=KINDS.values())
def test_noise_tunnel_by_the_same_noise(kind: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, noise = smooth(), torch.randn(5, 6).double(), Noise(0.3, 8)
    found = Averaged(Gradient(TARGET, signed=True), noise, of=of).wrap(net)(TensorDict({"input": x}, [5]))
    draws = noise.changed("input", x, 1, range(8))  # [draws, batch, features]

    def drawn(mean: object, std: object) -> Tensor:
        return (draws - x).movedim(0, 1).reshape(-1, 6)  # captum's draws lie beside each other by element

    monkeypatch.setattr(torch, "normal", drawn)
    tunnel = captum.NoiseTunnel(captum.Saliency(net))
    leaf = x.clone().requires_grad_()
    theirs = tunnel.attribute(leaf, target=1, nt_samples=8, stdevs=0.3, nt_type=kind, abs=False)
    if kind == "vargrad":  # captum divides by the number of draws, ours by one less
        theirs = theirs * 8 / 7
    close(found["attr", "input"], theirs)


def test_gradient_shap_in_expectation() -> None:
    """Both are the same integral over data and places, drawn."""
    net, x, data = smooth(), torch.randn(3, 6).double(), torch.randn(20, 6).double()
    baseline = TensorDict({"input": data}, [20])
    found = ExpectedGradients(TARGET, baseline=baseline, samples=4000).wrap(net)(
        TensorDict({"input": x}, [3])
    )
    expected = sum(
        captum.IntegratedGradients(net).attribute(x, row.expand_as(x), target=1, n_steps=24) for row in data
    ) / len(data)
    torch.testing.assert_close(found["attr", "input"], expected, rtol=0.05, atol=0.02)
    theirs = captum.GradientShap(net).attribute(x, data, n_samples=4000, stdevs=0.0, target=1)
    torch.testing.assert_close(found["attr", "input"], theirs.detach(), rtol=0.1, atol=0.04)
