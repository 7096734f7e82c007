"""Activation maps and products: written out, for layers of pictures and of tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Contrast, Target
from tdhook.attribution import (
    GradCAM,
    GradCAMPlusPlus,
    Gradient,
    GradientTimesInput,
    GuidedBackprop,
    HiResCAM,
    IntegratedGradients,
    LayerCAM,
    Product,
    XGradCAM,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 8 * 7, 3)
    ).double()


def pictures(*shape: int) -> TensorDict:
    return TensorDict({"input": torch.rand(*shape, 2, 12, 11).double()}, shape)


def weighed(kind: str, g: Tensor, a: Tensor) -> Tensor:
    """What each unit contributes, ``[channels, height, width]``, by explicit loops over channels and places."""
    found = torch.zeros_like(a)
    places = [(i, j) for i in range(a.shape[1]) for j in range(a.shape[2])]
    for c in range(len(a)):
        total = sum(a[c, i, j] for i, j in places)
        if kind == "GradCAM":
            weight = sum(g[c, i, j] for i, j in places) / len(places)
        elif kind == "XGradCAM":
            weight = sum(g[c, i, j] * a[c, i, j] for i, j in places) / total if total else 0.0
        elif kind == "GradCAMPlusPlus":
            weight = 0.0
            for i, j in places:
                bottom = 2 * g[c, i, j] ** 2 + total * g[c, i, j] ** 3
                weight += (g[c, i, j] ** 2 / bottom if bottom else 0.0) * max(g[c, i, j], 0.0)
        for i, j in places:
            if kind == "HiResCAM":
                weight = g[c, i, j]
            elif kind == "LayerCAM":
                weight = max(g[c, i, j], 0.0)
            found[c, i, j] = weight * a[c, i, j]
    return found


KINDS = {cls.__name__: cls for cls in (GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM)}


@pytest.mark.parametrize("name, kind", KINDS.items(), ids=KINDS)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("index", [1, "all"])
def test_each_kind(name, kind, relu, index) -> None:
    net, td = cnn(), pictures(2)
    found = kind("3", Target("output", index), relu=relu).wrap(net)(td.clone())
    value = net[:4](td["input"]).detach().requires_grad_()
    z = net[4:](value)
    for output in range(3) if index == "all" else [1]:
        grad = torch.autograd.grad(z[:, output].sum(), value, retain_graph=True)[0]
        for row in range(2):
            units = weighed(name, grad[row], value[row].detach())
            ours = found[row]["attr"]["3"]
            torch.testing.assert_close(ours[output] if index == "all" else ours, units, **EXACT)
            seen = units.sum(0).clamp(min=0) if relu else units.sum(0)
            large = F.interpolate(seen[None, None], (12, 11), mode="bilinear")[0].expand(2, 12, 11)
            ours = found[row]["attr", "input"]
            torch.testing.assert_close(ours[output] if index == "all" else ours, large, **EXACT)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "target", [Target("output", "all"), Contrast(Target("output", 0), Target("output", 1))]
)
def test_any_batch(shape, target) -> None:
    explained = LayerCAM("3", target).wrap(cnn())
    td = pictures(*shape)
    found, flat = explained(td.clone()), explained(td.reshape(-1))
    for key in (("attr", "input"), ("attr", "3")):
        torch.testing.assert_close(found[key].reshape(flat[key].shape), flat[key], **EXACT)
    assert set(explained.out_keys) == {"output", ("attr", "input"), ("attr", "3")}


class OwnBatch(nn.Module):
    """A model that makes a batch of whatever it is given."""

    def __init__(self, net: nn.Module, features: int) -> None:
        super().__init__()
        self.net, self.features = net, features

    def forward(self, x: Tensor) -> Tensor:
        own = x.reshape(-1, *x.shape[-self.features :])
        return self.net(own).reshape(*x.shape[: -self.features], 3)


@pytest.mark.parametrize("name, channel", [("picture", 0), ("tokens", -1)])
def test_a_batch_of_one_that_the_model_makes(name, channel) -> None:
    torch.manual_seed(0)
    net, td, layer = cnn(), pictures(), "net.3"
    if name == "tokens":
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
        td, layer = TensorDict({"input": torch.randn(6, 5).double()}), "net.1"
    axes = None if name == "picture" else (-2,)
    explained = GradCAM(layer, Target("output", 0), channel=channel, axes=axes).wrap(
        OwnBatch(net, td["input"].dim())
    )
    with pytest.raises(
        ValueError, match=rf"{layer!r} has the axes \[1, .* explain a batch of one, td.unsqueeze\(0\)"
    ):
        explained(td.clone())
    one = explained(td.unsqueeze(0))["attr", "input"]
    plain = GradCAM(layer[4:], Target("output", 0), channel=channel, axes=axes).wrap(net)
    torch.testing.assert_close(one, plain(td.unsqueeze(0))["attr", "input"], **EXACT)


class Tokens(nn.Module):
    """A transformer's layer on patches of a picture, behind a class token."""

    def __init__(self, skip: int = 1) -> None:
        super().__init__()
        self.skip = skip
        self.patches, self.block, self.head = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        cut = x.unfold(-2, 4, 4).unfold(-2, 4, 4).flatten(-2).flatten(-3, -2)  # [*batch, 6, 16]
        tokens = self.patches(cut)
        first = tokens.mean(-2, keepdim=True).expand(*tokens.shape[:-2], self.skip, 8)
        return self.head(self.block(torch.cat([first, tokens], -2)).tanh().mean(-2))


@pytest.mark.parametrize("skip", [1, 2])
@pytest.mark.parametrize("smooth", [True, False])
def test_tokens_on_a_grid(skip, smooth) -> None:
    net, x = Tokens(skip).double(), torch.rand(2, 8, 12).double()
    method = HiResCAM(
        "block", Target("output", 1), channel=-1, grid=(2, 3), skip=skip, relu=False, smooth=smooth
    )
    found = method.wrap(net)(TensorDict({"input": x}, [2]))
    units = found["attr", "block"]
    assert units.shape == (2, 6 + skip, 8)
    assert not units[:, :skip].any()
    seen = units[:, skip:].sum(-1).reshape(2, 1, 2, 3)
    how = {"mode": "bilinear"} if smooth else {"mode": "nearest"}
    torch.testing.assert_close(found["attr", "input"], F.interpolate(seen, (8, 12), **how)[:, 0], **EXACT)


def test_a_series_and_named_axes() -> None:
    """A map of one axis, along the steps of an observation that lie first."""

    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:  # [*batch, steps, features]
            return self.head(self.conv(x.mT).tanh().mean(-1))

    net, x = Series().double(), torch.randn(5, 9, 3).double()
    found = GradCAM("conv", Target("output", 0), axes=(-2,)).wrap(net)(TensorDict({"input": x}, [5]))
    seen = found["attr", "conv"].sum(1, keepdim=True).clamp(min=0)
    large = F.interpolate(seen, 9, mode="linear").mT.expand(5, 9, 3)
    torch.testing.assert_close(found["attr", "input"], large, **EXACT)


def test_inputs_without_the_axes_get_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.state = nn.Conv2d(2, 3, 3), nn.Linear(4, 3)

        def forward(self, picture: Tensor, state: Tensor) -> Tensor:
            return self.seen(picture).mean((-1, -2)) * self.state(state)

    td = TensorDict({"picture": torch.rand(3, 2, 8, 8), "state": torch.randn(3, 4)}, [3])
    explained = GradCAM("seen", Target("output", 0)).wrap(Two(), in_keys=["picture", "state"])
    found = explained(td)
    assert sorted(found["attr"].keys()) == ["picture", "seen"]
    assert ("attr", "state") not in explained.out_keys


def test_products() -> None:
    net, td = cnn(), pictures(2)
    both = Product(GradCAM("3", Target("output", "all")), GuidedBackprop())
    explained = both.wrap(net)
    found = explained(td.clone())
    cam = GradCAM("3", Target("output", "all")).wrap(net)(td.clone())["attr", "input"]
    guided = GuidedBackprop(Target("output", "all")).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(found["attr", "input"], cam * guided, **EXACT)
    other = both.explaining(Target("output", 2)).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(other, (cam * guided)[:, 2], **EXACT)
    thrice = Product(both, Gradient(signed=True)).wrap(net)(td.clone())["attr", "input"]
    grad = Gradient(Target("output", "all"), signed=True).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(thrice, cam * guided * grad, **EXACT)
    for copied in (copy.deepcopy(explained), pickle.loads(pickle.dumps(explained))):
        assert torch.equal(copied(td.clone())["attr", "input"], found["attr", "input"])


def test_mistakes() -> None:
    target, td = Target("output", 0), pictures(2)
    with pytest.raises(ValueError, match=r"is of one layer, '3', and gives '1' no relevance"):
        GradCAM("3", target, input_modules=["1", "3"])
    with pytest.raises(
        ValueError, match=r"the layer '5' has the axes \[3\], and a map needs that of channels"
    ):
        GradCAM("5", target).wrap(cnn())(td.clone())
    with pytest.raises(ValueError, match=r"has the axes \[5, 8, 7\], and a map needs .*channel=3"):
        GradCAM("3", target, channel=3).wrap(cnn())(td.clone())
    with pytest.raises(
        ValueError, match=r"has 56 places after the 0 that are skipped, which make no grid of \(5, 5"
    ):
        GradCAM("3", target, grid=(5, 5)).wrap(cnn())(td.clone())
    for axes in ((-1,), (-1, -1), (0, -1)):
        with pytest.raises(
            ValueError, match=r"the map of '3' has 2 axes, and axes=.* names others of inputs"
        ):
            GradCAM("3", target, axes=axes).wrap(cnn())(td.clone())
    with pytest.raises(
        ValueError, match=r"no input \('input' \[2, 12, 11\]\) has the axes \(-4, -1\) of the map"
    ):
        GradCAM("3", target, axes=(-4, -1)).wrap(cnn())(td.clone())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)).mean((-1, -2))

    with pytest.raises(
        ValueError, match="the layer 'conv' was called 2 times; name a module that is called once"
    ):
        GradCAM("conv", target).wrap(Twice().double())(td.clone())
    for pair in ((IntegratedGradients(), Gradient()), (Gradient(), IntegratedGradients())):
        with pytest.raises(
            TypeError, match="compares with a reference: a product is of methods that explain"
        ):
            Product(*pair)
    accounted = GradientTimesInput()
    accounted.__class__ = type("Accounted", (GradientTimesInput,), {"writes": (("ledger", "gap"),)})
    with pytest.raises(
        ValueError, match="writes more than relevance, which a product has not: leave out ledger"
    ):
        Product(Gradient(), accounted)


def test_guided_grad_cam_begins_with_the_map() -> None:
    with pytest.raises(ValueError, match=r"leaves out '1', of which GradCAM.* is: put that one first"):
        Product(GuidedBackprop(), GradCAM("1"))
