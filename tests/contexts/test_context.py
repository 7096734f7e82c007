"""What goes into an explained module, and what comes out: keys, batch shapes, tokens, inner values."""

from __future__ import annotations

import pytest
import torch
from explained_models import EXACT, chain, explain, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn

from tdhook import LRP, Target
from tdhook.models.families import Linear
from tdhook.rules import (
    FlatRule,
)
from tdhook.selectors import First

BATCHES = pytest.mark.parametrize("batch", [(), (5,), (2, 5), (2, 5, 3)], ids=str)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4, bias=False)
    ).double()


@BATCHES
@pytest.mark.parametrize("how", ["prepare", "wrap"])
def test_a_plain_module(batch, how):
    model = mlp()
    td = TensorDict(input=torch.randn(*batch, 3).double(), other=torch.zeros(batch), batch_size=batch)
    x = td["input"]
    if how == "wrap":
        explained = LRP(EXACT).wrap(model)
        result = explained(td)
    else:
        with LRP(EXACT).prepare(model) as explained:
            result = explained(td)
    assert isinstance(explained, TensorDictModuleBase)
    assert explained.in_keys == ["input"] and explained.out_keys == ["output", ("attr", "input")]
    assert result is td and set(td.keys(True, True)) == {"input", "other", "output", ("attr", "input")}
    assert td["input"] is x and td.batch_size == torch.Size(batch)
    assert torch.equal(td["output"], model(x)), "the module's own values, bit for bit"
    assert td["attr", "input"].shape == x.shape
    torch.testing.assert_close(td["attr", "input"].sum(-1), td["output"].sum(-1))


@BATCHES
def test_layers_of_fixed_rank_see_any_batch_shape(batch):
    model = cnn()
    td = TensorDict(input=torch.rand(*batch, 1, 4, 4).double(), batch_size=batch)
    td = explain(model, td)
    flat = explain(model, TensorDict(input=td["input"].reshape(-1, 1, 4, 4), batch_size=[max(td.numel(), 1)]))
    assert td["output"].shape == (*batch, 4) and td["attr", "input"].shape == (*batch, 1, 4, 4)
    torch.testing.assert_close(td["output"].reshape(-1, 4), flat["output"])
    torch.testing.assert_close(td["attr", "input"].reshape(-1, 1, 4, 4), flat["attr", "input"])


def test_the_plan_of_layers_of_fixed_rank():
    td = TensorDict(input=torch.rand(2, 3, 1, 4, 4).double(), batch_size=[2, 3])
    plan = LRP([(First(Linear), FlatRule()), *EXACT]).plan(cnn(), td)
    assert {row.path: row.rule for row in plan}["0"] == FlatRule()


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.pixels = nn.Linear(4, 3, bias=False)
        self.vector = nn.Linear(2, 3, bias=False)
        self.out = nn.Linear(6, 2, bias=False)

    def forward(self, pixels, vector):
        return self.out(torch.cat([self.pixels(pixels), self.vector(vector)], -1).relu())


@BATCHES
def test_several_nested_keys(batch):
    model = TensorDictModule(
        Mixed().double(), [("obs", "pixels"), ("obs", "deep", "vector")], [("heads", "q")]
    )
    obs = {"pixels": torch.randn(*batch, 4).double(), "deep": {"vector": torch.randn(*batch, 2).double()}}
    td = explain(model, TensorDict(obs=obs, batch_size=batch), target=Target(("heads", "q"), 1))
    attr = td["attr", "obs"]
    assert attr["pixels"].shape == (*batch, 4) and attr["deep", "vector"].shape == (*batch, 2)
    total = attr["pixels"].sum(-1) + attr["deep", "vector"].sum(-1)
    # F.relu between the modules is no module; it is piecewise linear, and plain autograd passes relevance too much or
    # too little only where it is off: there nothing may pass, which is right as well.
    torch.testing.assert_close(total, td["heads", "q"][..., 1])
    nested = explain(model, TensorDict(obs=obs, batch_size=batch), attribution_key=("why", "lrp"))
    torch.testing.assert_close(nested["why", "lrp", "obs", "pixels"].shape, attr["pixels"].shape)
    one = LRP(EXACT).wrap(model, in_keys=[("obs", "pixels")])
    assert one.out_keys == [("heads", "q"), ("attr", "obs", "pixels")]
    assert ("attr", "obs", "deep", "vector") not in one(TensorDict(obs=obs, batch_size=batch)).keys(True)


def test_keys_of_a_plain_module():
    model = Mixed()
    for in_keys in (
        ["a", ("b", "c")],
        {"pixels": "a", "vector": ("b", "c")},
        {"vector": ("b", "c"), "pixels": "a"},
    ):
        td = TensorDict(a=torch.randn(5, 4), b={"c": torch.randn(5, 2)}, batch_size=[5])
        with LRP(EXACT).prepare(model, in_keys=in_keys, out_keys=[("heads", "q")]) as explained:
            td = explained(td)
        torch.testing.assert_close(td["heads", "q"], model(td["a"], td["b", "c"]))
        assert td["attr", "a"].shape == (5, 4) and td["attr", "b", "c"].shape == (5, 2)
    for name, keys in (("in_keys", ["nope"]), ("out_keys", ["nope"])):
        tdm = TensorDictModule(model, ["a", "b"], ["q"])
        with (
            pytest.raises(ValueError, match=f"Key nope not in module.{name}"),
            LRP(EXACT).prepare(tdm, **{name: keys}),
        ):
            pass
    with pytest.raises(TypeError, match=r"expected an nn.Module or a TensorDictModule, got function"):
        LRP(EXACT).wrap(lambda x: x)


def test_called_with_tensors():
    model = TensorDictModule(Mixed(), ["a", "b"], ["q"])
    a, b = torch.randn(5, 4), torch.randn(5, 2)
    explained = LRP(EXACT).wrap(model)
    q, of_a, of_b = explained(a, b)
    td = explained(TensorDict(a=a, b=b, batch_size=[5]))
    assert (
        torch.equal(q, td["q"]) and torch.equal(of_a, td["attr", "a"]) and torch.equal(of_b, td["attr", "b"])
    )
    assert all(torch.equal(x, y) for x, y in zip(explained(a=a, b=b), (q, of_a, of_b), strict=True))


@BATCHES
def test_intermediate_keys(batch):
    model, td = chain(), TensorDict(obs=torch.randn(*batch, 3).double(), batch_size=batch)
    some = explain(model, td.clone(), attribute=["belief", "obs"], target=Target("q", 0))
    assert set(some["attr"].keys(True, True)) == {"belief", "obs"}
    every = explain(model, td.clone(), attribute="all", target=Target("q", 0))
    assert {"obs", ("hidden", "state"), "belief"} <= set(every["attr"].keys(True, True))
    for key in ("obs", ("hidden", "state"), "belief"):
        assert every[("attr", *((key,) if isinstance(key, str) else key))].shape == every[key].shape
        total = every["attr"].get(key).sum(-1)
        torch.testing.assert_close(total, every["q"][..., 0], msg=f"relevance is conserved at {key}")
    assert torch.equal(every["attr", "belief"], some["attr", "belief"])
    one = explain(model, td.clone(), attribute=[("hidden", "state")], target=Target("q", "all"))
    assert one["attr", "hidden", "state"].shape == (*batch, 2, 5) and "obs" not in one["attr"]


def test_attribute_says_what_it_takes():
    with pytest.raises(
        ValueError, match=r"attribute='belief' is neither 'all' nor a list of keys; write \['belief'\]"
    ):
        LRP(EXACT, attribute="belief")
    for name in ("input_modules", "target_modules"):
        with pytest.raises(ValueError, match=rf"{name}='enter' is no list of paths; write \['enter'\]"):
            LRP(EXACT, **{name: "enter"})
    with pytest.raises(
        ValueError, match="attribute names 'nope', which the model neither reads nor writes; it has 'obs'"
    ):
        LRP(EXACT, attribute=["nope"]).wrap(chain())


@BATCHES
def test_inner_modules(batch):
    model, td = mlp(), TensorDict(input=torch.randn(*batch, 3).double(), batch_size=batch)
    explained = LRP(EXACT, input_modules=["0", "1"]).wrap(model)
    td = explained(td)
    assert explained.out_keys[1:] == [("attr", "input"), ("attr", "0"), ("attr", "1")]
    for path in ("0", "1"):
        assert td["attr", path].shape == (*batch, 8)
        torch.testing.assert_close(td["attr", path].sum(-1), td["output"].sum(-1))
    alone = explain(model, td.select("input"), input_modules=["0"], use_inputs=False)
    assert set(alone["attr"].keys()) == {"0"} and torch.equal(alone["attr", "0"], td["attr", "0"])
    with pytest.raises(ValueError, match="the model has no module 'nope'; it has 0, 1, 2"):
        LRP(EXACT, input_modules=["nope"]).wrap(model)
