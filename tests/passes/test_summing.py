"""Sums of gradients over variants: through a linear front once, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import Averaged, Gradient, IntegratedGradients, InternalInfluence, Noise
from tdhook.contexts.attribution import Attribution
from tdhook.contexts.explained import ExplainedModule
from tdhook.passes import summing


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summing, "_FEW", 0)
    monkeypatch.setattr(summing, "_NARROW", 1)


class Net(nn.Module):
    """Layers, and what is done of them."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.other = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(6, 5)
        self.last = nn.LazyLinear(2)
        self.register_buffer("mean", torch.rand(3, 1, 1))
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.run(self, x)
        return self.last(z.relu().flatten(1).sin())  # type: ignore[no-any-return]


def _in_place(net: Net, x: Tensor) -> Tensor:
    x /= 3
    return net.conv(x)  # type: ignore[no-any-return]


def _written_into(net: Net, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :1] *= 2
    return net.conv(x)  # type: ignore[no-any-return]


LINEAR = {
    "bias and padding": lambda net, x: net.conv(x),
    "scaled": lambda net, x: net.conv(x / 255.0),
    "normalised": lambda net, x: net.conv((x - net.mean) / (net.mean + 1)),
    "batch norm": lambda net, x: net.norm(net.conv(2 * x)),
    "two layers": lambda net, x: net.conv(x) + net.other(1 - x),
    "two at once": lambda net, x: torch.cat([net.conv(x), net.other(x)], 1),
    "views": lambda net, x: net.linear(x.permute(0, 2, 3, 1).reshape(len(x), -1, 6)),
    "transposed": lambda net, x: net.linear(x.transpose(1, -1).transpose(1, -1)),
    "parts": lambda net, x: net.conv(torch.cat([x[:, 1:], x[:, :1]], 1)),
    "some": lambda net, x: net.linear(x[:, -1].unsqueeze(1)),
    "in place": _in_place,
    "pooled": lambda net, x: torch.nn.functional.avg_pool2d(net.conv(x), 2),
    "weighed by itself": lambda net, x: net.conv(x) * x.detach().mean((1, 2, 3), keepdim=True),
    "times another": lambda net, x: net.conv(x) * net.other(x),
    "functions alone": lambda net, x: x.flatten(2) @ torch.linspace(0, 1, 72, dtype=x.dtype).reshape(36, 2),
}
NOT = {
    "masked by itself": lambda net, x: net.conv(x * (x > 0.5)),
    "scaled by itself": lambda net, x: net.conv(x / x.detach().amax((1, 2, 3), keepdim=True)),
    "squared before": lambda net, x: net.conv(x.square()),
    "written into": _written_into,
    "twice, once not linear": lambda net, x: torch.cat([net.conv(x).flatten(1), x.square().flatten(1)], 1),
}


def _both(
    method: Attribution, net: nn.Module, td: TensorDict, keys: list[str] | None = None
) -> tuple[ExplainedModule, list[TensorDict]]:
    """Explained in the first call, in the second, and in one that goes all the way with each variant."""
    explained = method.wrap(net, in_keys=keys)
    found = [explained(td.copy()) for _ in range(2)]
    trusted = explained._setup.fronts.trusted
    explained._setup.fronts.trusted = False
    found.append(explained(td.copy()))
    explained._setup.fronts.trusted = trusted
    return explained, found


def _close(found: list[TensorDict], *key: str) -> bool:
    values = [td[("attr", *key)] for td in found]
    return all(torch.allclose(value, values[-1], rtol=1e-9, atol=1e-12) for value in values)


def _made(run: Callable[[Net, Tensor], Tensor]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net, x = Net(run).double().eval(), torch.rand(2, 3, 6, 6, dtype=torch.float64) - 0.3
    net(x.clone())
    return net, x


@pytest.mark.parametrize("index", [1, "all", "argmax"])
@pytest.mark.parametrize("name", [*LINEAR, *NOT])
def test_goes_through_a_linear_front_once(name: str, index: int | str) -> None:
    net, x = _made({**LINEAR, **NOT}[name])
    td = TensorDict({"input": x}, [2])
    method = IntegratedGradients(Target("output", index), steps=5, baseline=0.1)
    explained, found = _both(method, net, td)
    assert explained._setup.fronts.trusted is (None if name in NOT else True)
    assert _close(found, "input")
    assert torch.equal(found[0]["attr", "input"], found[1]["attr", "input"])
    with torch.no_grad():
        net.conv.weight.mul_(-2)
        net.other.weight.add_(1)
    again = explained(td.copy())
    assert _close([again, _both(method, net, td)[1][-1]], "input")


@pytest.mark.parametrize("index", [1, "all"])
def test_noise_is_averaged_on_the_way_back(index: int | str) -> None:
    net, x = _made(LINEAR["scaled"])
    method = Averaged(Gradient(Target("output", index), signed=True), Noise(0.3, 6))
    explained, found = _both(method, net, TensorDict({"input": x}, [2]))
    assert explained._setup.fronts.trusted is True
    each = Averaged(Gradient(Target("output", index), signed=True), Noise(0.3, 6), spread=True)
    found.append(each.wrap(net)(TensorDict({"input": x}, [2])))
    assert _close(found, "input")


def test_a_subclass_that_explains_in_its_own_way_is_asked_each_time() -> None:
    class Doubled(Gradient):
        def explain(self, runner, td):  # type: ignore[no-untyped-def]
            return {key: 2 * x for key, x in super().explain(runner, td).items()}

    net, x = _made(LINEAR["scaled"])
    td = TensorDict({"input": x}, [2])
    one, two = (
        Averaged(method(Target("output", 0), signed=True), Noise(0.3, 4)).wrap(net)(td.copy())
        for method in (Gradient, Doubled)
    )
    assert torch.allclose(two["attr", "input"], 2 * one["attr", "input"])


def test_several_keys_and_batch_axes() -> None:
    torch.manual_seed(0)
    first = TensorDictModule(nn.Conv1d(2, 3, 2), ["pictures"], ["seen"])
    second = TensorDictModule(
        lambda z, y: torch.cat([z.flatten(-2), y], -1).tanh(), ["seen", "vector"], ["h"]
    )
    third = TensorDictModule(nn.Linear(13, 2), ["h"], ["out"])
    net = TensorDictSequential(first, second, third).double()
    td = TensorDict(
        {
            "pictures": torch.rand(2, 3, 2, 4, dtype=torch.float64),
            "vector": torch.rand(2, 3, 4, dtype=torch.float64),
        },
        [2, 3],
    )
    explained, found = _both(IntegratedGradients(Target("out", "all"), steps=5), net, td)
    assert explained._setup.fronts.trusted is True
    assert _close(found, "pictures") and _close(found, "vector")


def test_what_variants_have_apart_is_gone_through_apart() -> None:
    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return (self.linear(x) * weight).tanh()

    torch.manual_seed(0)
    td = TensorDict({"x": torch.rand(3, 4).double(), "weight": torch.rand(3, 3).double()}, [3])
    net = TensorDictModule(Weighed().double(), ["x", "weight"], ["out"])
    explained, found = _both(IntegratedGradients(Target("out", 1), steps=5, attribute=["x"]), net, td)
    assert explained._setup.fronts.trusted is True  # as far as the layer, which is before
    assert _close(found, "x")


def test_elements_that_need_more_steps_have_a_front_of_their_own() -> None:
    net, x = _made(LINEAR["scaled"])
    x = torch.cat([x, 1e-3 * x])
    method = IntegratedGradients(Target("output", 1), tolerance=1e-7, steps=4097)
    _, found = _both(method, net, TensorDict({"input": x}, [4]))
    assert _close(found, "input")


def test_a_layer_on_the_way_of_the_inputs() -> None:
    net, x = _made(lambda net, x: net.other(net.conv(x)[:, :3].exp()))
    method = InternalInfluence(Target("output", 1), input_modules=["conv"], steps=5)
    _, found = _both(method, net, TensorDict({"input": x}, [2]))
    assert _close(found, "conv")


@pytest.mark.parametrize("change", [lambda g: 3 * g, lambda g: g.clamp(min=0), lambda g: g.abs() + g**3])
def test_hooks_on_gradients_are_heeded(change: Callable[[Tensor], Tensor]) -> None:
    def hooked(net: Net, x: Tensor) -> Tensor:
        z = net.conv(x)
        z.register_hook(change)
        return z + 0.5

    net, x = _made(hooked)
    _, found = _both(IntegratedGradients(Target("output", 1), steps=5), net, TensorDict({"input": x}, [2]))
    assert _close(found, "input")


def test_hooks_of_modules_are_heeded() -> None:
    net, x = _made(LINEAR["scaled"])
    net.conv.register_forward_hook(lambda module, args, z: z.relu() + z)
    net.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    explained, found = _both(
        IntegratedGradients(Target("output", 1), steps=5), net, TensorDict({"input": x}, [2])
    )
    assert explained._setup.fronts.trusted is True
    assert _close(found, "input")


def test_weights_made_anew_in_each_run() -> None:
    net, x = _made(LINEAR["scaled"])
    torch.nn.utils.parametrizations.weight_norm(net.conv)
    explained, found = _both(
        IntegratedGradients(Target("output", 1), steps=5), net, TensorDict({"input": x}, [2])
    )
    assert explained._setup.fronts.trusted is True
    assert _close(found, "input")


@pytest.mark.parametrize("name, least", [("_FEW", 2**15), ("_NARROW", 28)])
def test_small_fronts_are_gone_through_each_time(
    name: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summing, name, least)
    net, x = _made(LINEAR["scaled"])
    explained, _ = _both(
        IntegratedGradients(Target("output", 1), steps=5), net, TensorDict({"input": x}, [2])
    )
    assert explained._setup.fronts.trusted is None


def test_integers_of_pictures() -> None:
    net, x = _made(lambda net, x: net.conv(x.double() / 255))
    td = TensorDict({"input": (255 * x.abs()).to(torch.uint8)}, [2])
    explained, found = _both(IntegratedGradients(Target("output", 1), steps=5), net, td)
    assert explained._setup.fronts.trusted is True
    assert torch.allclose(found[1]["attr", "input"], found[2]["attr", "input"], rtol=1e-5, atol=1e-7)


def test_what_is_not_finite_is_said() -> None:
    """Finite as far as the front, and too large behind it."""
    net, x = _made(lambda net, x: net.conv(1e300 * x) * 1e-300)
    td = TensorDict({"input": x}, [2])
    explained = IntegratedGradients(Target("output", 1), steps=5).wrap(net)
    explained(td.copy())
    assert explained._setup.fronts.trusted is True
    net.run = lambda net, x: net.conv(1e200 * (1e200 * (x * 1e-300))) * 1e-100
    with torch.no_grad():
        net.last.weight.mul_(1e250)
    with pytest.raises(ValueError, match="finite"):
        explained(td.copy())
