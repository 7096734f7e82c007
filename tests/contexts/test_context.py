"""An explained module does what the model did and writes relevance: batch shapes, keys, modes, copies, odd models."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdhook import LRP, Target
from tdhook.models.families import Linear
from tdhook.rules import (
    EpsilonRule,
    FlatRule,
    IgnoreRule,
    LayerNormRule,
    PassRule,
    PseudoIdentityRule,
    ZPlusRule,
    stabilize,
)
from tdhook.selectors import First

EXACT = [(Linear, EpsilonRule(1e-12)), ((nn.ReLU, nn.Tanh), PassRule())]
BATCHES = pytest.mark.parametrize("batch", [(), (5,), (2, 5), (2, 5, 3)], ids=str)


def mlp(n_in=3, n_out=4, bias=False):
    net = nn.Sequential(nn.Linear(n_in, 8, bias=bias), nn.ReLU(), nn.Linear(8, n_out, bias=bias))
    return net.double()


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4, bias=False)
    ).double()


def explain(model, td, composite=EXACT, **kwargs):
    with LRP(composite, **kwargs).prepare(model) as explained:
        return explained(td)


# --- What goes in and out -------------------------------------------------------------------------


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


def chain():
    return TensorDictSequential(
        TensorDictModule(mlp(3, 5), ["obs"], [("hidden", "state")]),
        TensorDictModule(mlp(5, 5), [("hidden", "state")], ["belief"]),
        TensorDictModule(mlp(5, 2), ["belief"], ["q"]),
    )


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


# --- Modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("composite", [EXACT, [(First(Linear), FlatRule()), *EXACT]], ids=["plain", "traced"])
def test_inside_modes_without_gradients(mode, composite):
    model, td = (
        mlp(),
        TensorDict(input=torch.randn(5, 3).double(), action=torch.arange(5) % 4, batch_size=[5]),
    )
    method = LRP(composite, target=Target("output", "action"))
    outside = method.wrap(model)(td.clone())
    with mode():
        made_here = td.clone()
        inside = method.wrap(model)(made_here)
        assert not torch.is_grad_enabled()
    for key in ("output", ("attr", "input")):
        assert torch.equal(inside[key], outside[key])
        assert not inside[key].requires_grad


def test_what_comes_back_is_detached_and_the_graph_is_freed():
    model, seen = mlp(), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    x = torch.randn(5, 3).double().requires_grad_()
    td = explain(model, TensorDict(input=x, batch_size=[5]), attribute="all", input_modules=["0"])
    assert td["input"] is x and x.grad is None
    assert not any(value.requires_grad for key, value in td.items(True, True) if key != "input")
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    gc.collect()
    assert seen and seen[0]() is None, "an activation is still alive"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_inputs_without_gradient_get_no_entry_and_say_so_once(dtype):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x, mask):
            return self.fc(x) * mask

    model = TensorDictModule(Masked(), ["x", "mask"], ["out"])
    td = TensorDict(x=torch.randn(5, 3), mask=torch.ones(5, 2).to(dtype), batch_size=[5])
    explained = LRP(EXACT).wrap(model)
    with pytest.warns(
        UserWarning, match=f"input 'mask' is {dtype}, which has no gradient: it gets no relevance entry"
    ):
        out = explained(td.clone())
    assert set(out["attr"].keys()) == {"x"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(td.clone())
        explained(x=td["x"], mask=td["mask"])


@pytest.mark.parametrize("frozen", [False, True])
def test_tokens_are_explained_at_their_embedding(frozen):
    model = TensorDictSequential(
        TensorDictModule(nn.Embedding(7, 3), ["token"], ["embedded"]),
        TensorDictModule(mlp().float(), ["embedded"], ["q"]),
    ).requires_grad_(not frozen)
    td = TensorDict(token=torch.arange(5), batch_size=[5])
    path = next(name for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    method = {"composite": [*EXACT, (nn.Embedding, IgnoreRule())], "target": "q"}
    with pytest.warns(UserWarning, match="input 'token' is torch.int64"):
        by_path = explain(model, td.clone(), **method, input_modules=[path])["attr", path]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_key = explain(model, td.clone(), **method, attribute=["embedded"])["attr", "embedded"]
        every = explain(model, td.clone(), **method, attribute="all")["attr", "embedded"]
    assert by_path.shape == (5, 3) and torch.equal(by_key, by_path) and torch.equal(every, by_path)


# --- Lasting modules ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [mlp, chain, lambda: nn.Linear(3, 2).double()], ids=["plain", "tensordict", "layer"]
)
def test_a_wrapped_module_is_the_model(make):
    model = make()
    key = "obs" if isinstance(model, TensorDictSequential) else "input"
    explained = LRP(EXACT, target="q" if key == "obs" else "output").wrap(model)
    td = TensorDict({key: torch.randn(5, 3).double()}, batch_size=[5])
    before = explained(td.clone())

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    assert same(explained.state_dict(), model.state_dict())
    assert {id(p) for p in explained.parameters()} == {id(p) for p in model.parameters()}
    for clone in (copy.deepcopy(explained), pickle.loads(pickle.dumps(explained))):
        again = clone(td.clone())
        assert all(torch.equal(before[k], again[k]) for k in before.keys(True, True))
        assert same(clone.state_dict(), model.state_dict())
        with torch.no_grad():
            next(clone.parameters()).mul_(2)
        assert not same(clone.state_dict(), model.state_dict()), "a copy has parameters of its own"
        clone.load_state_dict(model.state_dict())
        torch.testing.assert_close(clone(td.clone())["attr"], before["attr"])
    other = make()
    explained.load_state_dict(other.state_dict())
    assert same(model.state_dict(), other.state_dict())
    explained.eval()
    assert not model.training and not any(m.training for m in model.modules())
    explained.train()
    assert all(m.training for m in model.modules())
    explained.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert explained(td.float())["attr", key].dtype == torch.float32


def test_a_wrapped_module_goes_into_a_sequence():
    explained = LRP(EXACT, target=Target("q", 0)).wrap(chain())
    model = TensorDictSequential(
        TensorDictModule(lambda x: 2 * x, ["raw"], ["obs"]),
        explained,
        TensorDictModule(lambda a: a.abs().argmax(-1), [("attr", "obs")], ["top"]),
    )
    assert model.in_keys == ["raw"]
    assert model(TensorDict(raw=torch.randn(5, 3).double(), batch_size=[5]))["top"].shape == (5,)


def test_a_prepared_module_ends_with_its_block():
    td = TensorDict(input=torch.randn(5, 3).double(), batch_size=[5])
    with LRP(EXACT).prepare(mlp()) as explained:
        explained(td)
    with pytest.raises(
        RuntimeError, match=r"ended with its `with` block; use `\.wrap\(module\)` for one that lasts"
    ):
        explained(td)


# --- Conventions that meet ------------------------------------------------------------------------


def test_gradient_rules_in_the_relevance_flow():
    first, norm, gelu, last = nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)
    model = nn.Sequential(first, norm, gelu, last).double()
    torch.nn.init.normal_(norm.weight)
    eps = 0.01
    composite = [
        (nn.Linear, EpsilonRule(eps)), (nn.LayerNorm, LayerNormRule()), (nn.GELU, PseudoIdentityRule(eps))
    ]  # fmt: skip
    td = explain(
        model,
        TensorDict(input=torch.randn(5, 3).double(), batch_size=[5]),
        composite,
        target=Target("output", 1),
        flow="relevance",
    )
    with torch.no_grad():
        x = td["input"]
        a, w = first(x), norm.weight
        b = norm(a)
        c = gelu(b)
        z = last(c)
        r = z * torch.tensor([0.0, 1.0])
        r = c * (r / stabilize(z, eps) @ last.weight)
        g = (
            r / c * c / stabilize(b, eps)
        )  # the identity rule as a gradient, between relevance before and after it
        r = b * g
        g = w * r / b
        g = (g - g.mean(-1, keepdim=True)) / (a.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        r = a * g
        r = x * (r / stabilize(a, eps) @ first.weight)
    torch.testing.assert_close(td["attr", "input"], r)


def test_the_flow_is_the_one_that_nothing_need_be_converted_to():
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    norm = (nn.LayerNorm, LayerNormRule())
    assert LRP([norm]).plan(model).flow == "gradient"
    assert LRP([norm, (nn.Linear, EpsilonRule(0.01))]).plan(model).flow == "gradient"
    assert LRP([norm, (nn.Linear, EpsilonRule(0.01, zero_params="bias"))]).plan(model).flow == "relevance"
    assert LRP([norm, (nn.Linear, ZPlusRule())]).plan(model).flow == "relevance"
    # What a mapper's rules bring to the inputs is written as it is: relevance, if one of them says so.
    rules = {nn.LayerNorm: LayerNormRule(), nn.Linear: EpsilonRule(0.01)}
    assert LRP(rule_mapper=lambda name, module: rules.get(type(module))).plan(model).flow == "relevance"


def test_a_modified_gradient_is_given_as_it_is():
    model = mlp()
    td = explain(
        model,
        TensorDict(input=torch.randn(5, 3).double(), batch_size=[5]),
        "deconvnet",
        target=Target("output", 1),
    )
    first, _, last = model
    torch.testing.assert_close(td["attr", "input"], (last.weight[1].clamp(min=0) @ first.weight).expand(5, 3))
