"""On a TensorDictModule a rule sees keys: the relevance of what the module writes becomes that of what it reads."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Target
from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    LayerNormRule,
    PassRule,
    Rule,
    StopRule,
    UniformEpsilonRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook.selectors import Name, Reads, Type


class Both(nn.Module):
    """Reads two values and writes two."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a, b):
        h = self.left(a).tanh() + self.right(b)
        return h, h.sin()


def keyed(nested=True):
    ins = [("obs", "a"), ("obs", "b")] if nested else ["a", "b"]
    outs = ["sum", ("heads", "sine")] if nested else ["sum", "sine"]
    return TensorDictModule(Both().double(), ins, outs)


def data(*batch):
    obs = {"a": torch.randn(*batch, 3).double(), "b": torch.randn(*batch, 2).double()}
    return TensorDict(obs=obs, batch_size=batch)


def leaves(td, *keys):
    td = td.clone()
    for key in keys:
        td.set(key, td.get(key).requires_grad_())
    return td


BATCHES = pytest.mark.parametrize("batch", [(), (5,), (2, 5)], ids=str)
KEYS = [("obs", "a"), ("obs", "b")]


def epsilon_by_hand(module, inputs, relevances, eps):
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = module(*inputs)
    seeds = [r / (z + eps * z.sign()).detach() for r, z in zip(relevances, outputs, strict=True)]
    return [x.detach() * g for x, g in zip(inputs, torch.autograd.grad(outputs, inputs, seeds), strict=True)]


@BATCHES
def test_relevance_of_keys_written_becomes_that_of_keys_read(batch):
    model, td = keyed(), leaves(data(*batch), *KEYS)
    bare = model(data(*batch).update(td.detach()))
    relevances = [torch.randn(*batch, 4).double() for _ in range(2)]
    with EpsilonRule(0.1).register(model):
        out = model(td)
        assert (
            out is td
            and torch.equal(td["sum"], bare["sum"])
            and torch.equal(td["heads", "sine"], bare["heads", "sine"])
        )
        torch.autograd.backward([td["sum"], td["heads", "sine"]], relevances)
    expected = epsilon_by_hand(model.module, [td[key] for key in KEYS], relevances, 0.1)
    for key, r in zip(KEYS, expected, strict=True):
        torch.testing.assert_close(td[key].grad, r)


def test_registration_leaves_no_trace():
    model = keyed()
    forward, attributes = model.forward, list(vars(model))
    rule = EpsilonRule()
    handle = rule.register(model)
    model(data(5))
    handle.remove()
    assert model.forward == forward and list(vars(model)) == attributes
    with pytest.raises(RuntimeError), StopRule().register(model):
        model(
            TensorDict(obs={"a": torch.randn(5, 7).double(), "b": torch.randn(5, 2).double()}, batch_size=[5])
        )
    assert model.forward == forward and list(vars(model)) == attributes


@pytest.mark.parametrize("nested", [True, False])
def test_called_with_tensors(nested):
    model, td = keyed(nested), data(5)
    a, b = (td[key].clone().requires_grad_() for key in KEYS)
    with EpsilonRule(0.1).register(model):
        first = model(a, b)
        named = {"obs_a": a, "obs_b": b} if nested else {"a": a, "b": b}
        second = model(**named)
        mixed = model(a, **dict(list(named.items())[1:]))
    for outputs in (first, second, mixed):
        grads = torch.autograd.grad(outputs, [a, b], [z.detach() for z in outputs])
        expected = epsilon_by_hand(model.module, [a, b], [z.detach() for z in outputs], 0.1)
        for g, r in zip(grads, expected, strict=True):
            torch.testing.assert_close(g, r)


def test_an_output_elsewhere():
    model, td = keyed(), leaves(data(5), *KEYS)
    bare = model(data(5).update(td.detach()))
    with EpsilonRule(0.1).register(model):
        elsewhere = TensorDict(batch_size=[5])
        returned = model(td, tensordict_out=elsewhere)
    assert returned is elsewhere and "sum" not in td
    assert torch.equal(elsewhere["sum"], bare["sum"])
    grads = torch.autograd.grad(elsewhere["sum"], [td[key] for key in KEYS], bare["sum"].detach())
    relevances = [bare["sum"].detach(), torch.zeros_like(bare["sum"])]
    expected = epsilon_by_hand(model.module, [td[key] for key in KEYS], relevances, 0.1)
    for g, r in zip(grads, expected, strict=True):
        torch.testing.assert_close(g, r)


@pytest.mark.parametrize(
    "rule",
    [
        AlphaBetaRule(),
        ZPlusRule(),
        GammaRule(),
        WSquareRule(),
        FlatRule(),
        ZBoxRule(-3.0, 3.0),
        EpsilonRule(0.1),
        StopRule(),
    ],
    ids=repr,
)
@BATCHES
def test_every_rule_acts_on_keys_as_on_tensors(rule, batch):
    layer = nn.Linear(3, 4).double()
    model = TensorDictModule(layer, [("obs", "a")], [("out", "z")])
    td, x = leaves(data(*batch), ("obs", "a")), None
    with rule.register(model):
        z = model(td)["out", "z"]
        z.backward(z.detach())
    x = td["obs", "a"].detach().clone().requires_grad_()
    with rule.register(layer):
        z = layer(x)
        z.backward(z.detach())
    torch.testing.assert_close(td["obs", "a"].grad, x.grad)


def test_uniform_epsilon_and_pass():
    product = TensorDictModule(lambda a, b: a * b, ["a", "b"], ["ab"])
    td = leaves(TensorDict(a=torch.randn(5, 3), b=torch.randn(5, 3), batch_size=[5]), "a", "b")
    with UniformEpsilonRule(0.0).register(product):
        z = product(td)["ab"]
        z.backward(z.detach())
    torch.testing.assert_close(td["a"].grad, (z / 2).detach())
    torch.testing.assert_close(td["b"].grad, (z / 2).detach())
    act = TensorDictModule(nn.Tanh(), ["a"], ["out"])
    with PassRule().register(act):
        assert torch.equal(torch.autograd.grad(act(td)["out"].sum(), td["a"])[0], torch.ones(5, 3))
    text = "PassRule requires the number of inputs and outputs to be the same"
    with PassRule().register(product), pytest.raises(ValueError, match=text):
        product(td)


# --- A user's rule --------------------------------------------------------------------------------


class Plain(Rule):
    """Epsilon, as a user writes it for one output."""

    @staticmethod
    def forward(ctx, apply_kwargs, module, model_kwargs, *inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            output = module._prev_forward(*leaves, **model_kwargs)
        ctx.save_for_backward(output, *leaves)
        return output.detach()

    @staticmethod
    def backward(ctx, *out_relevance):
        output, *inputs = ctx.saved_tensors
        grads = torch.autograd.grad(output, inputs, out_relevance[0] / (output + 0.1 * output.sign()))
        return None, None, None, *(x * g for x, g in zip(inputs, grads, strict=True))


class ForKeys(Rule):
    """Gives all that was written to the first key that was read."""

    @staticmethod
    def forward(ctx, apply_kwargs, module, model_kwargs, *inputs):
        ctx.inputs = [x.shape for x in inputs]
        ctx.names = list(module.in_keys), list(module.out_keys)
        outputs = module._prev_forward(*inputs, **model_kwargs)
        assert isinstance(outputs, tuple) and len(outputs) == 2
        return outputs

    @staticmethod
    def backward(ctx, *out_relevance):
        total = sum(r.sum(-1, keepdim=True) for r in out_relevance)
        first, *others = ctx.inputs
        return (
            None,
            None,
            None,
            total.expand(first) / first[-1],
            *(torch.zeros(shape).double() for shape in others),
        )


class OneOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = Both()

    def forward(self, a, b):
        return self.both(a, b)[0]


def test_a_users_rule_works_on_keys_as_on_tensors():
    """The very rule that works on the module works on the TensorDictModule around it."""
    inner = OneOutput().double()
    model = TensorDictModule(inner, KEYS, [("out", "z")])
    td = leaves(data(5), *KEYS)
    with Plain().register(model):
        z = model(td)["out", "z"]
        z.backward(z.detach())
    for key in KEYS:
        assert td[key].grad is not None
    xs = [td[key].detach().clone().requires_grad_() for key in KEYS]
    with Plain().register(inner):
        z = inner(*xs)
        z.backward(z.detach())
    for key, x in zip(KEYS, xs, strict=True):
        torch.testing.assert_close(td[key].grad, x.grad)


@BATCHES
def test_a_users_rule_for_several_keys(batch):
    model, td = keyed(), leaves(data(*batch), *KEYS)
    with ForKeys().register(model):
        model(td)
        torch.autograd.backward(
            [td["sum"], td["heads", "sine"]], [td["sum"].detach(), td["heads", "sine"].detach()]
        )
    total = td["sum"].sum(-1, keepdim=True) + td["heads", "sine"].sum(-1, keepdim=True)
    torch.testing.assert_close(td["obs", "a"].grad, (total / 3).expand(*batch, 3).detach())
    assert not td["obs", "b"].grad.any()


# --- In a context ---------------------------------------------------------------------------------


def sequence():
    return TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4).double(), [("obs", "a")], ["x"]),
        TensorDictModule(nn.Linear(2, 4).double(), [("obs", "b")], [("deep", "y")]),
        TensorDictModule(OneProduct(), ["x", ("deep", "y")], ["xy"]),
        TensorDictModule(nn.Linear(4, 2).double(), ["xy"], ["q"]),
    )


class OneProduct(nn.Module):
    def forward(self, x, y):
        return x * y.tanh()


@BATCHES
@pytest.mark.parametrize("rule", [UniformEpsilonRule(1e-12), Plain()], ids=["built in", "user's"])
def test_a_rule_for_a_tensordictmodule_inside_a_context(batch, rule):
    model, td = sequence(), data(*batch)
    composite = [(Reads(("deep", "y")), rule), (nn.Linear, EpsilonRule(1e-12, zero_params="bias"))]
    with LRP(composite, attribute="all", target=Target("q", 1)).prepare(model) as explained:
        td = explained(td)
    attr = td["attr"]
    x, y, xy, last = td["x"], td["deep", "y"], td["xy"], model[3].module
    seed = td["q"] * torch.tensor([0.0, 1.0])
    no_bias = xy @ last.weight.T
    r = xy * (seed / (no_bias + 1e-12 * no_bias.sign()) @ last.weight)
    torch.testing.assert_close(attr["xy"], r.detach())
    if isinstance(rule, Plain):
        g = r / (xy + 0.1 * xy.sign())
        expected = x * y.tanh() * g, y * x * (1 - y.tanh() ** 2) * g
    else:
        expected = r / 2, y * x * (1 - y.tanh() ** 2) * r / xy / 2
    torch.testing.assert_close(attr["x"], expected[0].detach())
    torch.testing.assert_close(attr["deep", "y"], expected[1].detach())
    assert attr["obs", "a"].shape == (*batch, 3) and attr["obs", "b"].shape == (*batch, 2)


def test_a_gradient_rule_on_keys_converts_in_the_relevance_flow():
    class Normed(nn.LayerNorm): ...

    norm = Normed(4).double()
    torch.nn.init.normal_(norm.weight)
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4).double(), [("obs", "a")], ["x"]),
        TensorDictModule(norm, ["x"], ["n"]),
        TensorDictModule(nn.Linear(4, 2).double(), ["n"], ["q"]),
    )
    results = []
    for selector in (Type(Normed), Name("*1")):
        composite = [(selector, LayerNormRule()), (nn.Linear, EpsilonRule(0.01))]
        torch.manual_seed(1)
        with LRP(composite, attribute="all", target="q").prepare(model) as explained:
            td = explained(data(5))
        x, r = td["x"], td["attr", "n"]
        g = norm.weight * r / td["n"]
        g = (g - g.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        torch.testing.assert_close(td["attr", "x"], (x * g).detach())
        results.append(td["attr", "obs", "a"])
    torch.testing.assert_close(*results)


def test_a_rule_for_a_whole_sequence():
    model, td = sequence(), data(5)
    with LRP([(Name(""), EpsilonRule(0.1))], target=Target("q")).prepare(model) as explained:
        td = explained(td)
    xs = [td[key].clone().requires_grad_() for key in KEYS]
    q = model(TensorDict(obs={"a": xs[0], "b": xs[1]}, batch_size=[5]))["q"]
    grads = torch.autograd.grad(q, xs, (q / (q + 0.1 * q.sign())).detach())
    for key, x, g in zip(KEYS, xs, grads, strict=True):
        torch.testing.assert_close(td[("attr", *key)], (x * g).detach())


def test_what_is_no_tensor_is_carried_along():
    class Argmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4).double()

        def forward(self, a):
            z = self.fc(a)
            return z, z.argmax(-1)

    model = TensorDictModule(Argmax(), ["a"], ["z", "action"])
    td = leaves(TensorDict(a=torch.randn(5, 3).double(), tag="kept", batch_size=[5]), "a")
    with EpsilonRule().register(model):
        model(td)
        td["z"].backward(td["z"].detach())
    assert td["action"].dtype == torch.int64 and td["tag"] == "kept" and td["a"].grad.isfinite().all()
