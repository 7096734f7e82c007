"""Code written for tdhook 0.3 runs unchanged. Literal figures are what tdhook 0.3.0 printed for the same script."""

from __future__ import annotations

import pytest
import torch
from drop_in import X, fixed, mlp, run, values
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook.attribution import LRP
from tdhook.attribution.lrp_helpers.rules import (
    BaseRuleMapper,
    EpsilonPlus,
    stabilize,
)

BATCHES = pytest.mark.parametrize("batch", [(), (5,), (2, 5)], ids=str)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(3, 4),
    )  # fmt: skip


def plus(**kwargs):
    return LRP(rule_mapper=EpsilonPlus(), skip_modules=LRP.default_skip, **kwargs)


def test_figures():
    ones = run(
        LRP(rule_mapper=EpsilonPlus(epsilon=0.5), skip_modules=LRP.default_skip),
        fixed(),
        TensorDict(input=X, batch_size=[3]),
    )["attr", "input"]
    expected = [[1.8409, 0.1534], [2.9878, -0.7959], [-0.7083, 1.4167]]
    torch.testing.assert_close(ones, torch.tensor(expected), atol=1e-4, rtol=0)
    lrp = LRP(rule_mapper=EpsilonPlus(epsilon=0.5), skip_modules=LRP.default_skip, init_attr_grads=values)
    whole = run(lrp, fixed(), TensorDict(input=X, batch_size=[3]))["attr", "input"]
    expected = [[6.4432, 0.5369], [14.5061, -2.2687], [-0.0208, 0.0417]]
    torch.testing.assert_close(whole, torch.tensor(expected), atol=1e-4, rtol=0)


def epsilon_by_hand(model, x, seed):
    first, act, last = model
    a = first(x)
    h = act(a)
    r = h * (seed / stabilize(last(h)) @ last.weight)
    return (x * (r / stabilize(a) @ first.weight)).detach()


@BATCHES
def test_relevance_starts_from_ones_or_from_what_is_said(batch):
    model, x = mlp(), torch.randn(*batch, 3)
    td = run(plus(), model, TensorDict(input=x, batch_size=batch))
    assert td.batch_size == torch.Size(batch) and "_mod_in" not in td
    torch.testing.assert_close(
        td["attr", "input"], epsilon_by_hand(model, x, torch.ones(*batch, 4)), rtol=1e-3, atol=1e-4
    )

    def one(targets, extra):
        return TensorDict(out=targets["output"][..., 1], batch_size=targets.batch_size)

    td = run(
        plus(init_attr_targets=one, init_attr_grads=values), model, TensorDict(input=x, batch_size=batch)
    )
    seed = model(x).detach() * torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(td["attr", "input"], epsilon_by_hand(model, x, seed), rtol=1e-3, atol=1e-4)


@BATCHES
def test_a_small_cnn(batch):
    model, x = cnn(), torch.rand(*batch, 1, 6, 6)
    td = run(plus(init_attr_grads=values), model, TensorDict(input=x, batch_size=batch))
    assert td["attr", "input"].shape == x.shape
    single = [
        run(plus(init_attr_grads=values), model, TensorDict(input=one[None], batch_size=[1]))["attr", "input"]
        for one in x.reshape(-1, 1, 6, 6)
    ]
    torch.testing.assert_close(
        td["attr", "input"].reshape(-1, 1, 6, 6), torch.cat(single), rtol=1e-3, atol=1e-4
    )


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, a, b):
        return self.head(self.act(self.a(a) + self.b(b)))


@pytest.mark.parametrize(
    "in_keys",
    [["x", ("n", "y")], {"a": "x", "b": ("n", "y")}, {"b": ("n", "y"), "a": "x"}],
    ids=["list", "dict", "turned"],
)
def test_several_inputs(in_keys):
    model = Two()
    td = TensorDict(x=torch.randn(5, 3), n={"y": torch.randn(5, 2)}, batch_size=[5])
    lrp = LRP(rule_mapper=EpsilonPlus(), warn_on_missing_rule=False, init_attr_grads=values)
    td = run(lrp, model, td, in_keys, [("o", "z")])
    x, y = td["x"], td["n", "y"]
    a, b = model.a(x), model.b(y)
    h = model.act(a + b)
    z = model.head(h)
    # The sum of a and b is no module: plain autograd copies the relevance, as it did.
    r = h * (z / stabilize(z) @ model.head.weight)
    torch.testing.assert_close(
        td["attr", "x"], (x * (r / stabilize(a) @ model.a.weight)).detach(), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        td["attr", "n", "y"], (y * (r / stabilize(b) @ model.b.weight)).detach(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "wrapped, paths",
    [(False, ["0", "1"]), (True, ["module.0", "module.1"]), (True, ["module[0]", "module[1]"])],
)
@BATCHES
def test_modules_as_inputs(wrapped, paths, batch):
    model, td = mlp(), TensorDict(input=torch.randn(*batch, 3), batch_size=batch)
    given = TensorDictModule(model, ["input"], ["output"]) if wrapped else model
    lrp = plus(input_modules=paths, use_inputs=False, attribution_key="why", init_attr_grads=values)
    with lrp.prepare(given) as hooked:
        assert hooked.in_keys == ["input"] and hooked.out_keys == [
            "output",
            *(("why", path) for path in paths),
        ]
        td = hooked(td)
    h = model[1](model[0](td["input"]))
    z = model(td["input"])
    r = (h * (z / stabilize(z) @ model[2].weight)).detach()
    assert set(td["why"].keys()) == set(paths)
    for path in paths:
        torch.testing.assert_close(td["why", path], r, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use_outputs, expected", [(True, {"0", "output"}), (False, {"0"})])
def test_modules_as_targets(use_outputs, expected):
    seen = []

    def only_the_first_layer(targets, extra):
        seen.append(set(targets.keys(True, True)))
        return targets.select("0")

    model, td = mlp(), TensorDict(input=torch.randn(5, 3), batch_size=[5])
    lrp = plus(target_modules=["0"], use_outputs=use_outputs, init_attr_targets=only_the_first_layer)
    td = run(lrp, model, td)
    assert seen == [expected]
    a = model[0](td["input"])
    r = (td["input"] * (1 / stabilize(a) @ model[0].weight)).detach()
    torch.testing.assert_close(td["attr", "input"], r, rtol=1e-3, atol=1e-4)


@BATCHES
@pytest.mark.parametrize("make, shape", [(mlp, (3,)), (cnn, (1, 6, 6))], ids=["mlp", "cnn"])
def test_additional_keys(batch, make, shape):
    """Initialisers see the batch shape that the caller gave, whatever the layers need."""

    def chosen(targets, extra):
        assert set(extra.keys(True, True)) == {("deep", "index")}
        assert extra.batch_size == targets.batch_size == torch.Size(batch)
        return TensorDict(
            out=targets["output"].gather(-1, extra["deep", "index"]), batch_size=targets.batch_size
        )

    model, index = make(), torch.randint(4, (*batch, 1))
    td = TensorDict(input=torch.rand(*batch, *shape), deep={"index": index}, batch_size=batch)
    lrp = plus(additional_init_keys=[("deep", "index")], init_attr_targets=chosen)
    with lrp.prepare(model) as hooked:
        assert hooked.in_keys == ["input", ("deep", "index")]
        td = hooked(td)

    def seed(targets, extra):
        return TensorDict(
            output=nn.functional.one_hot(index.squeeze(-1), 4).float(), batch_size=targets.batch_size
        )

    same = run(plus(init_attr_grads=seed), model, td.select("input"))
    torch.testing.assert_close(td["attr", "input"], same["attr", "input"], rtol=1e-3, atol=1e-4)


def test_inputs_may_be_chosen():
    lrp = LRP(
        rule_mapper=EpsilonPlus(),
        warn_on_missing_rule=False,
        init_attr_inputs=lambda inputs, extra: inputs.select("a"),
    )
    td = TensorDict(a=torch.randn(5, 3), b=torch.randn(5, 2), batch_size=[5])
    assert set(run(lrp, Two(), td, ["a", "b"], ["z"])["attr"].keys()) == {"a"}


def test_intermediate_keys_are_kept_where_asked():
    td = run(plus(clean_intermediate_keys=False), mlp(), TensorDict(input=torch.randn(5, 3), batch_size=[5]))
    kept = {("_register_in", "input"), ("_mod_in", "input"), ("_mod_out", "output"), ("attr", "input")}
    assert kept <= set(td.keys(True, True))
    assert torch.equal(td["_mod_in", "input"], td["input"])


def test_a_sequence():
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), ["x"], ["h"]),
        TensorDictModule(nn.ReLU(), ["h"], ["h2"]),
        TensorDictModule(nn.Linear(4, 2), ["h2"], ["y"]),
    )
    td = TensorDict(x=torch.randn(5, 3), batch_size=[5])
    lrp = plus(init_attr_targets=lambda targets, extra: targets.select("y"), init_attr_grads=values)
    got = run(lrp, model, td.clone())["attr", "x"]
    plain = nn.Sequential(*(m.module for m in model.module))
    expected = epsilon_by_hand(plain, td["x"], plain(td["x"]))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_missing_rules_are_told():
    """Of every module that is not skipped, by its name below the model that was given."""
    model = TensorDictModule(mlp(), ["a"], ["b"])
    texts = [
        "No rule found for module `` (TensorDictModule)",
        "No rule found for module `module` (Sequential)",
        "No rule found for module `module.0` (Linear)",
        "No rule found for module `module.2` (Linear)",
    ]
    with (
        pytest.warns(UserWarning, match="No rule found") as told,
        LRP(rule_mapper=BaseRuleMapper()).prepare(model),
    ):
        pass
    assert [str(warning.message) for warning in told] == texts
    with (
        pytest.warns(UserWarning, match="No rule found") as told,
        LRP(rule_mapper=BaseRuleMapper(), skip_modules=LRP.default_skip, warn_on_missing_rule=True).prepare(
            model
        ),
    ):
        pass
    assert [str(warning.message) for warning in told] == texts[2:]
    with LRP(rule_mapper=BaseRuleMapper(), warn_on_missing_rule=False).prepare(model):
        pass
    assert all(
        LRP.default_skip(name, m) for name, m in [("", model), ("module", mlp()), ("x", nn.ModuleList())]
    )
    assert not LRP.default_skip("0", nn.Linear(1, 1))


def test_without_any_rule_it_is_the_gradient():
    model, x = mlp(), torch.randn(5, 3)
    td = run(LRP(warn_on_missing_rule=False), model, TensorDict(input=x, batch_size=[5]))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(td["attr", "input"], torch.autograd.grad(model(leaf).sum(), leaf)[0])


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"additional_init_keys": ["input"]}, "Additional init keys must not be in the in_keys or out_keys"),
        (
            {"init_attr_targets": lambda t, e: t["output"]},
            "init_attr_targets function must return a TensorDict",
        ),
        ({"init_attr_grads": lambda t, e: t["output"]}, "init_attr_grads function must return a TensorDict"),
        ({"init_attr_inputs": lambda t, e: t["input"]}, "init_attr_inputs function must return a TensorDict"),
        (
            {"init_attr_grads": lambda t, e: t.clone().rename_key_("output", "q")},
            "Targets and init_grads must have the same keys",
        ),
        (
            {"init_attr_grads": lambda t, e: TensorDict(output=t["output"])},
            "init_grads should have the same batch size as targets",
        ),
    ],
)
def test_errors(kwargs, text):
    with pytest.raises(ValueError, match=text):
        run(plus(**kwargs), mlp(), TensorDict(input=torch.randn(5, 3), batch_size=[5]))


@pytest.mark.parametrize("name", ["init_attr_cache_in", "output_grad_callbacks", "cache_callback"])
def test_what_is_not_there_is_refused_by_name(name):
    with pytest.raises(TypeError, match=f"LRP has no {name}, which tdhook 0.3 has: "):
        LRP(rule_mapper=EpsilonPlus(), **{name: lambda *args: None})
    LRP(rule_mapper=EpsilonPlus(), **{name: None})
