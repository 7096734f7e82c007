"""Methods by name, and from data."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import References, Target, attribution
from tdhook.attribution import (
    LRP,
    Attribution,
    Averaged,
    BiLRP,
    GradCAM,
    Gradient,
    IntegratedGradients,
    Product,
    Shapley,
)
from tdhook.attribution.catalogue import METHODS, REQUIRED, method, method_from_dict
from tdhook.configuration import read_method
from tdhook.perturbing.features import patches

NEEDED = {"layer": "0", "composite": "epsilon", "input_modules": ["1"], "window": 4}
FEW = {"shapley", "shapley_interaction", "kernel_shap", "shapley_sampling", "pred_diff"}
"""Ask as often as there are features, or more."""


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].mean((1, 2)).unsqueeze(-1)


def pictures(name: str) -> tuple[nn.Module, TensorDict]:
    torch.manual_seed(0)
    if name == "attention_rollout":
        return Attending().double(), TensorDict({"input": torch.rand(4, 5, 8).double()}, [4])
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6 * 6, 1 + (name == "sarfa"))
    ).double()
    return net, TensorDict({"input": torch.rand(4, 2, 8, 8).double()}, [4])


def test_all_are_listed() -> None:
    exported = {kind for kind in map(vars(attribution).get, attribution.__all__) if isinstance(kind, type)}
    methods = {kind for kind in exported if issubclass(kind, Attribution)} - {
        Attribution,
        Averaged,
        BiLRP,
        Product,
    }
    assert methods == {listed.kind for listed in METHODS.values()}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("attention_rollout", "patching")])
def test_each_explains(name: str) -> None:
    listed = METHODS[name]
    options = {
        key: NEEDED[key] for key in NEEDED if key in listed.needs or listed.options.get(key) is REQUIRED
    }
    if name in FEW:
        options["features"] = partial(patches, size=4)
    if name == "sarfa":
        options["target"] = Target("output", "argmax")
    net, td = pictures(name)
    found = method(name, **options).wrap(net)(td)["attr", "input"]
    assert found.shape == td["input"].shape and found.any()


def test_a_method_is_data() -> None:
    data = {"method": "gradient", "signed": True, "averaged": {"noise": 0.1, "samples": 7, "of": "squares"}}
    found = method_from_dict(data)
    assert isinstance(found, Averaged) and isinstance(found.method, Gradient)
    assert (found.method.signed, found.over.samples, found.of) == (True, 7, "squares")
    assert method_from_dict({"method": "gradient", "averaged": {"flips": [-1, -2]}}).over.samples == 4
    assert method_from_dict({"method": "gradient", "averaged": {"shifts": 1}}).over.samples == 9
    product = method_from_dict({"method": "grad_cam", "layer": "0", "times": "guided_backprop"})
    assert isinstance(product, Product) and isinstance(product.methods[0], GradCAM)


def test_a_method_from_text() -> None:
    found = read_method("integrated_gradients:steps=12,baseline='mean'")
    assert isinstance(found, IntegratedGradients) and found.steps == 12
    assert isinstance(found.references, References) and found.references.baseline == "mean"
    assert read_method("integrated_gradients", baseline="sample", samples=3).samples == 3
    assert read_method("integrated_gradients", baseline="sample:4").samples == 4
    assert isinstance(read_method("epsilon_gamma_box:low=-1,high=1"), LRP)


def test_features_from_text() -> None:
    td = TensorDict({"input": torch.rand(3, 2, 4, 6).double()}, [3])
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 1)).double()
    for text, shape in (("whole", (1,)), ("patches:2", (1, 2, 3)), ("along:0", (2,))):
        found = read_method("ablation", features=text).wrap(net)(td.clone())["attr", "input"]
        assert len(found[0].unique()) == torch.Size(shape).numel()
    with pytest.raises(
        ValueError, match="features 'patches:x' are none; they are whole, patches:SIZE or along:AXIS"
    ):
        read_method("ablation", features="patches:x")


def test_features_in_a_file(tmp_path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.flatten(1).square().sum(1, keepdim=True) * y.sum(1, keepdim=True)

    td = TensorDict({"x": torch.rand(3, 2, 4, 4).double(), "y": torch.rand(3, 4).double()}, [3])
    file = tmp_path / "method.toml"
    file.write_text('method = "shapley"\n[features]\nx = "patches:2"\ny = [0, 0, 1, -1]\n')
    expected = Shapley(features={"x": partial(patches, size=2), "y": torch.tensor([0, 0, 1, -1])})
    found, expected = (
        one.wrap(Two(), ["x", "y"])(td.clone())["attr"] for one in (read_method(file), expected)
    )
    assert (found == expected).all() and (found["y"][:, 3] == 0).all()
    with pytest.raises(ValueError, match="features=3 is neither 'whole', numbers by entry nor a function"):
        read_method("ablation:features=3")


def test_a_method_from_a_file(tmp_path) -> None:
    file = tmp_path / "method.toml"
    file.write_text('method = "lrp"\nbaseline = 0.0\n[composite]\npreset = "epsilon"\n')
    assert isinstance(read_method(file), LRP) and read_method(file).references is not None
    file.write_text('preset = "epsilon"\nbaseline = "mean"\n')
    found = read_method(file)
    assert isinstance(found, LRP) and found.references is not None and found.references.baseline == "mean"


@pytest.mark.parametrize(
    "data, told",
    [
        ({}, "'method' is the name of a method, one of lrp, gradient"),
        ({"method": "gradient", "averaged": 3}, "'averaged' is a table that says over what"),
        (
            {"method": "gradient", "averaged": {"of": "mean"}},
            "'averaged' names one of noise, flips, shifts, got of",
        ),
        ({"method": "gradient", "averaged": {"noise": 0.1, "loud": 1}}, "'averaged' takes other values"),
        ({"method": "gradient", "averaged": {"noise": -1.0}}, "a standard deviation, which is not negative"),
        ({"method": "gradient", "times": "nothing"}, "no method is named 'nothing'"),
        ({"method": "integrated_gradients", "tolerance": -1.0}, "a positive number, got -1.0"),
    ],
)
def test_what_describes_none(data, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        method_from_dict(data)
