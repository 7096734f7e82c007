"""What is put in at the output arrives at the input, on networks that nobody chose."""

from __future__ import annotations

import copy

import pytest
import torch
from drawing import drawing
from hypothesis import HealthCheck, assume, given, note
from hypothesis import strategies as st
from rules import reference
from rules.checks import assert_close
from rules.networks import Family, convolutional_networks, dense_networks, well_posed
from tensordict import TensorDict
from torch import nn

from tdhook.attribution import LRP
from tdhook.composites import Composite
from tdhook.models.families import Activation, AvgPool, BatchNorm, Linear, MaxPool
from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    IgnoreRule,
    LayerNormRule,
    NormRule,
    PassRule,
    PseudoIdentityRule,
    UniformEpsilonRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook.selectors import Name, Type
from tdhook.targets import Target

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# Many a network is turned down, because somewhere it has no input to give relevance to.
OFTEN = {
    "suppress_health_check": [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]
}

TINY = 1e-14  # a stabiliser that keeps nothing to speak of, and makes zero over zero a zero
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def composite(rule, first=None, activation=None):
    """``rule`` on every layer with weights, ``first`` on the first one."""
    layers = [(Name("0"), first)] if first is not None else []
    return Composite(
        [
            *layers,
            (Type(Linear), rule),
            (Type(AvgPool), NormRule(TINY)),
            (Type(Activation) | Type(BatchNorm), PassRule() if activation is None else activation),
            (Type(MaxPool) | Type(nn.Flatten, nn.Identity, nn.Dropout), IgnoreRule()),
        ]
    )


# name: (the rule of the first layer or None, the rule of the others, what each output needs)
CONSERVING = {
    "epsilon": (None, EpsilonRule(0.0), "sum"),
    "uniform_epsilon": (None, UniformEpsilonRule(TINY), "sum"),
    "gamma": (None, GammaRule(0.25, stabilizer=TINY), "sum"),
    "gamma_large": (None, GammaRule(10.0, stabilizer=TINY), "sum"),
    "zplus": (None, ZPlusRule(stabilizer=TINY), "positive"),
    "alpha1_beta0": (None, AlphaBetaRule(1.0, 0.0, stabilizer=TINY), "positive"),
    "alpha2_beta1": (None, AlphaBetaRule(2.0, 1.0, stabilizer=TINY), "both"),
    "alpha1.5_beta.5": (None, AlphaBetaRule(1.5, 0.5, stabilizer=TINY), "both"),
    "wsquare": (None, WSquareRule(stabilizer=TINY), "always"),
    "flat": (None, FlatRule(stabilizer=TINY), "always"),
    "flat_then_epsilon": (FlatRule(stabilizer=TINY), EpsilonRule(TINY), "sum"),
    "wsquare_then_zplus": (WSquareRule(stabilizer=TINY), ZPlusRule(stabilizer=TINY), "positive"),
    "box_then_gamma": (ZBoxRule(-6.0, 6.0, stabilizer=TINY), GammaRule(stabilizer=TINY), "sum"),
}


def family(needs, **options):
    return Family(rectifying=needs != "always", balanced=needs == "both", **options)


def per_sample(tensor, batch):
    return tensor.reshape(*batch, -1).sum(-1)


def explain(drawn, rules, target=None, dtype=torch.float64):
    """The outputs and the inputs' relevance, after a look that nothing else has changed."""
    network, x = copy.deepcopy(drawn.network).to(dtype), drawn.x.to(dtype)
    before = copy.deepcopy(network)
    td = TensorDict({"input": x}, batch_size=drawn.batch)
    with LRP(rules, target=target or Target("output")).prepare(network) as explained:
        td = explained(td)
    note(f"{drawn.network}\n{tuple(drawn.x.shape)} {dtype}")
    with torch.no_grad():
        assert torch.equal(td["output"], before(x.clone()))
    assert td.batch_size == torch.Size(drawn.batch)
    attr = td["attr", "input"]
    assert attr.shape == x.shape and attr.dtype == x.dtype
    assert not attr.requires_grad
    for module in network.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
    for (name, now), then in zip(network.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(now, then), name
    return td["output"].double(), attr.double()


def assert_conserved(target, attr, batch, tolerance):
    """Per sample, up to a tolerance of all that was put in, positive and negative.

    Where much more than that arrives with both signs, the sum is a difference of large numbers, and what these were
    rounded by counts.
    """
    scale = torch.maximum(per_sample(target.abs(), batch), 1e-3 * per_sample(attr.abs(), batch))
    error = (per_sample(attr, batch) - per_sample(target, batch)).abs()
    assert (error <= tolerance * scale).all(), (
        f"{per_sample(attr, batch)} arrived, {per_sample(target, batch)} was put in"
    )


@pytest.mark.parametrize("networks", [dense_networks, convolutional_networks])
@pytest.mark.parametrize("name", CONSERVING)
def test_conserving_rules_conserve(name, networks):
    first, rule, needs = CONSERVING[name]

    @drawing(40, **OFTEN)
    @given(networks(family(needs)), st.sampled_from([torch.float64, torch.float64, torch.float32]))
    def run(drawn, dtype):
        assume(well_posed(drawn, needs))
        output, attr = explain(drawn, composite(rule, first), dtype=dtype)
        assert_conserved(output, attr, drawn.batch, TOLERANCE[dtype])

    run()


@pytest.mark.parametrize("index", ["argmax", "integer"])
@pytest.mark.parametrize("name", ["epsilon", "gamma", "zplus", "wsquare", "box_then_gamma"])
def test_of_one_output_the_relevance_is_its_value(name, index):
    first, rule, needs = CONSERVING[name]

    @drawing(15, **OFTEN)
    @given(dense_networks(family(needs)), st.integers(0, 7))
    def run(drawn, number):
        assume(well_posed(drawn, needs))
        number %= drawn.network[-1].out_features
        target = Target("output", index="argmax" if index == "argmax" else number)
        output, attr = explain(drawn, composite(rule, first), target)
        chosen = output.max(-1).values if index == "argmax" else output[..., number]
        assert_conserved(chosen.unsqueeze(-1), attr, drawn.batch, 1e-9)

    run()


@pytest.mark.parametrize("name", ["epsilon", "gamma", "wsquare", "flat_then_epsilon"])
@pytest.mark.parametrize(
    "activation", [PassRule(), PseudoIdentityRule(TINY)], ids=["pass", "pseudo_identity"]
)
def test_the_two_conventions_meet(name, activation):
    """Normalisation is ruled in the gradient convention, layers with weights in the other."""
    first, rule, needs = CONSERVING[name]
    rules = Composite([(Type(nn.LayerNorm, nn.RMSNorm), LayerNormRule())]) + composite(
        rule, first, activation
    )

    @drawing(25, **OFTEN)
    @given(dense_networks(family(needs, norms=(nn.LayerNorm, nn.RMSNorm))))
    def run(drawn):
        assume(well_posed(drawn, needs))
        output, attr = explain(drawn, rules)
        assert_conserved(output, attr, drawn.batch, 1e-9)

    run()


BIASED = {
    "epsilon": (EpsilonRule(TINY), {"stab": TINY}),
    "gamma": (GammaRule(0.5, stabilizer=TINY), {"gamma": 0.5, "stab": TINY}),
    "zplus": (ZPlusRule(stabilizer=TINY), {"stab": TINY}),
    "alpha_beta": (AlphaBetaRule(stabilizer=TINY), {"stab": TINY}),
    "wsquare": (WSquareRule(stabilizer=TINY), {"stab": TINY}),
    "flat": (FlatRule(stabilizer=TINY), {"stab": TINY}),
}


def with_biases(drawn):
    """The same network with a bias in every layer that has weights."""
    generator = torch.Generator().manual_seed(1)
    for module in drawn.network:
        if hasattr(module, "weight"):
            out = module.weight.shape[0]
            module.bias = nn.Parameter(torch.randn(out, dtype=torch.float64, generator=generator) / 2)
    return drawn


@pytest.mark.parametrize("name", BIASED)
def test_what_is_missing_is_the_share_of_the_biases(name):
    """Layer by layer, by hand: the bias is one more input, and keeps what it is given."""
    rule, parameters = BIASED[name]
    needs = {"zplus": "positive", "alpha_beta": "both", "wsquare": "always", "flat": "always"}.get(
        name, "sum"
    )

    @drawing(15, **OFTEN)
    @given(dense_networks(family(needs, batch_norm=False)).map(with_biases))
    def run(drawn):
        assume(well_posed(drawn, needs))
        output, attr = explain(drawn, composite(rule))
        steps = list(drawn.steps())
        kept, relevance = torch.zeros(drawn.batch, dtype=torch.float64), output
        for module, x, _, _ in reversed(steps):
            if not isinstance(module, nn.Linear):
                continue
            layer = reference.explicit(module, x.shape[-1:])
            shares = [
                reference.bias_share(name, layer, a, b, **parameters)
                for a, b in zip(
                    x.reshape(-1, x.shape[-1]), relevance.reshape(-1, layer.weight.shape[0]), strict=True
                )
            ]
            kept += torch.stack(shares).reshape(drawn.batch)
            relevance = reference.relevance(name, layer, x, relevance, **parameters)
        deficit = per_sample(output, drawn.batch) - per_sample(attr, drawn.batch)
        scale = torch.maximum(per_sample(output.abs(), drawn.batch), per_sample(attr.abs(), drawn.batch))
        assert ((deficit - kept).abs() <= 1e-9 * scale).all(), f"{deficit} is missing, the biases keep {kept}"
        assert_close(attr, relevance)
        if name == "flat":
            assert not kept.any()

    run()


def test_a_network_that_is_switched_off_has_no_relevance():
    """All units off: nothing came out, nothing arrives, and nothing is NaN."""
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        network[0].weight.fill_(-1.0)
    td = TensorDict({"input": torch.ones(2, 3, dtype=torch.float64)}, batch_size=[2])
    for name, (first, rule, _) in CONSERVING.items():
        if name == "epsilon":
            rule = EpsilonRule(1e-6)
        with LRP(composite(rule, first), target=Target("output")).prepare(network) as explained:
            attr = explained(td.clone())["attr", "input"]
        assert torch.equal(attr, torch.zeros_like(attr)), name


def test_conservation_would_notice_a_leak():
    """The check has teeth: a stabiliser that keeps a hundredth of a percent is seen."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    td = TensorDict({"input": torch.randn(2, 3, dtype=torch.float64)}, batch_size=[2])
    with LRP(composite(EpsilonRule(lambda z: z * 1.0001)), target=Target("output")).prepare(
        network
    ) as explained:
        td = explained(td)
    with pytest.raises(AssertionError, match="was put in"):
        assert_conserved(td["output"], td["attr", "input"], (2,), 1e-9)
