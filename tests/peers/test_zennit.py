"""Every preset equals zennit's composite of that name, on the architectures that agents and image models are made of.

Relevance presets start from the value of the explained output, gradient presets from one, in both libraries.

In float32 the largest output is explained, as it is for a greedy policy. An output that is close to zero because its
terms cancel has not five right digits in float32, and neither has a relevance that starts there: with the batch-normed
model both libraries then err by up to 3e-4 from what they find in float64. So other outputs are explained in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.relevance.composites.composite import PRESETS, preset
from tdhook.relevance.propagation.stabilisers import stabilize
from tdhook.rules import EpsilonPlus

from .models import CASES, assert_equal, model, relative_errors

REASON = "zennit is not installed; `nox -s peers` installs it"
composites = pytest.importorskip("zennit.composites", reason=REASON)
canonizers = pytest.importorskip("zennit.canonizers", reason=REASON)

pytestmark = pytest.mark.peers

FLOAT32, FLOAT64 = 1e-5, 1e-9
ZENNIT = {
    "epsilon_plus": composites.EpsilonPlus,
    "epsilon_plus_flat": composites.EpsilonPlusFlat,
    "epsilon_alpha2_beta1": composites.EpsilonAlpha2Beta1,
    "epsilon_alpha2_beta1_flat": composites.EpsilonAlpha2Beta1Flat,
    "epsilon_gamma_box": composites.EpsilonGammaBox,
    "excitation_backprop": composites.ExcitationBackprop,
    "guided_backprop": composites.GuidedBackprop,
    "deconvnet": composites.DeconvNet,
    "beta_smooth": composites.BetaSmooth,
}
GRADIENT = ("guided_backprop", "deconvnet", "beta_smooth")
BOX = {"epsilon_gamma_box": {"low": -3.0, "high": 3.0}}
Parameters = dict[str, Any]


@contextmanager
def identity_batch_norms(module: nn.Module) -> Iterator[None]:
    """Makes the batch norms that zennit has merged into linear layers the identity that they stand for.

    zennit sets their statistics to zero and one but keeps their ``eps``, so each still divides by ``sqrt(1 + eps)``:
    5e-6 per layer in the model's own output, and in what is explained.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.eps for norm in norms]
    try:
        for norm in norms:
            norm.eps = 0.0
        yield
    finally:
        for norm, eps in zip(norms, before, strict=True):
            norm.eps = eps


@contextmanager
def out_of_place(module: nn.Module) -> Iterator[None]:
    inplace = [m for m in module.modules() if getattr(m, "inplace", False)]
    try:
        for each in inplace:
            each.inplace = False
        yield
    finally:
        for each in inplace:
            each.inplace = True


def explained_outputs(module: nn.Module, x: Tensor) -> Tensor:
    """The largest output in float32; in float64 another one for each sample, so that values have either sign."""
    return module(x).argmax(-1) if x.dtype == torch.float32 else torch.arange(len(x)) % 6


def with_zennit(
    name: str,
    module: nn.Module,
    x: Tensor,
    *,
    exact: bool = True,
    inplace: bool = True,
    ones: bool = False,
    **given: Any,
) -> Tensor:
    """What zennit finds for the inputs.

    ``exact`` makes merged batch norms the identity, ``inplace`` leaves in-place activations as they are, ``ones``
    starts from ones at all outputs; the rest are the composite's parameters.
    """
    index = explained_outputs(module, x).unsqueeze(1)
    x = x.clone().requires_grad_()
    composite = ZENNIT[name](**given, canonizers=[canonizers.SequentialMergeBatchNorm()])
    with ExitStack() as stack:
        stack.enter_context(composite.context(module))
        if exact:
            stack.enter_context(identity_batch_norms(module))
        if not inplace:
            stack.enter_context(out_of_place(module))
        z = module(x)
        seed = torch.ones_like(z)
        if not ones:
            seed = torch.zeros_like(z).scatter_(1, index, 1.0)
            seed = seed if name in GRADIENT else seed * z.detach()
        return torch.autograd.grad(z, x, seed)[0]


def with_tdhook(composite: Any, module: nn.Module, x: Tensor, **settings: Any) -> Tensor:
    """What this library finds; the model's output must be its own."""
    settings = settings or {"target": Target("output", explained_outputs(module, x))}
    with LRP(composite, **settings).prepare(module) as explained:
        td = explained(TensorDict({"input": x}, [len(x)]))
    assert torch.equal(td["output"], module(x))
    return td["attr", "input"]


def both(name: str, module: nn.Module, x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    given = BOX.get(name, {}) | given
    # See test_beta_smooth_reads_the_input_of_an_inplace_relu. All other presets meet the model as it is in zennit, too.
    theirs = with_zennit(name, module, x, inplace=name != "beta_smooth", **given)
    return with_tdhook(preset(name, **given), module, x), theirs


def test_every_preset_is_compared() -> None:
    assert set(ZENNIT) == set(PRESETS) - {
        "epsilon",
        "deeplift",
        "deeplift_reveal_cancel",
        "deeplift_shapley",
        "attn_lrp",
        "cp_lrp",
        "lstm_lrp",
        "relp",
    }  # not in zennit


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", ZENNIT)
@pytest.mark.parametrize("case", ["mlp", "nature_cnn", "batch_normed_cnn"])
@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float32, FLOAT32), (torch.float64, FLOAT64)], ids=["float32", "float64"]
)
def test_preset(case: str, name: str, batch: int, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = both(name, model(case, dtype), CASES[case].inputs(batch, dtype))
    assert_equal(ours, theirs, tolerance)


@pytest.mark.parametrize("batch", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ZENNIT)
def test_preset_on_vgg(name: str, batch: int) -> None:
    ours, theirs = both(name, model("vgg11"), CASES["vgg11"].inputs(batch))
    assert_equal(ours, theirs, FLOAT32)


def largest_of_batch(z: Tensor) -> Tensor:
    """A stabiliser that depends on the denominators as a whole."""
    return stabilize(z, 0.01 * z.abs().max().item())


@pytest.mark.parametrize(
    "name,given",
    [
        ("epsilon_plus", {"epsilon": 0.1, "stabilizer": 0.01}),
        ("epsilon_plus", {"epsilon": largest_of_batch, "stabilizer": largest_of_batch}),
        ("epsilon_plus", {"zero_params": "bias"}),
        ("epsilon_plus_flat", {"zero_params": ["bias"], "stabilizer": 0.1}),
        ("epsilon_alpha2_beta1", {"epsilon": 0.1, "stabilizer": 0.01, "zero_params": "bias"}),
        ("epsilon_alpha2_beta1_flat", {"epsilon": 0.1, "stabilizer": 0.01}),
        ("epsilon_gamma_box", {"epsilon": 0.1, "stabilizer": 0.01, "gamma": 1.0}),
        (
            "epsilon_gamma_box",
            {
                "low": torch.tensor([-3.0, -4.0, -5.0]).view(1, 3, 1, 1),
                "high": torch.tensor([3.0, 3.5, 4.0]).view(1, 3, 1, 1),
            },
        ),
        ("excitation_backprop", {"stabilizer": 0.01, "zero_params": "bias"}),
    ],
)
def test_parameters_of_presets(name: str, given: Parameters) -> None:
    module, x = model("batch_normed_cnn", torch.float64), CASES["batch_normed_cnn"].inputs(5, torch.float64)
    ours, theirs = both(name, module, x, **given)
    assert_equal(ours, theirs, FLOAT64)
    default, _ = both(name, module, x)
    assert relative_errors(default, theirs)[0] > 1e-3, "the parameters make no difference"


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_sharpness_of_beta_smooth(sharpness: float) -> None:
    x = CASES["mlp"].inputs(5)
    ours = with_tdhook(preset("beta_smooth", beta=sharpness), model("mlp"), x)
    assert_equal(ours, with_zennit("beta_smooth", model("mlp"), x, beta_smooth=sharpness), FLOAT32)


@pytest.mark.parametrize("case", CASES)
def test_rule_mapper(case: str) -> None:
    x = CASES[case].inputs(1 if case == "vgg11" else 5)
    target = Target("output", "argmax")
    mapper = EpsilonPlus(epsilon=1e-3, stabilizer=1e-4)
    ours = with_tdhook(None, model(case), x, rule_mapper=mapper, target=target, skip_modules=LRP.default_skip)
    assert_equal(ours, with_zennit("epsilon_plus", model(case), x, epsilon=1e-3, stabilizer=1e-4), FLOAT32)


@pytest.mark.parametrize("case", ["mlp", "nature_cnn", "batch_normed_cnn"])
def test_rule_mapper_starts_from_ones(case: str) -> None:
    module, x = model(case, torch.float64), CASES[case].inputs(5, torch.float64)
    ours = with_tdhook(None, module, x, rule_mapper=EpsilonPlus(), skip_modules=LRP.default_skip)
    assert_equal(ours, with_zennit("epsilon_plus", module, x, ones=True), FLOAT64)


def test_batch_norm_behind_an_activation_passes() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 6)
    ).requires_grad_(False)
    module(torch.randn(64, 3, 6, 6))  # running statistics
    x = torch.randn(5, 3, 6, 6)
    # Not merged by either library, so its eps is part of the model.
    ours = with_tdhook("epsilon_plus", module.eval(), x)
    assert_equal(ours, with_zennit("epsilon_plus", module, x, exact=False), FLOAT32)


class TestKnownDifferences:
    """Where zennit does something else, on purpose or not, and what that comes to."""

    def test_beta_smooth_reads_the_input_of_an_inplace_relu(self) -> None:
        # sigmoid(beta * x) of the input x. zennit takes that of max(x, 0), which an in-place ReLU leaves behind.
        module = model("vgg11")
        x = CASES["vgg11"].inputs(1)
        ours = with_tdhook("beta_smooth", module, x)
        with out_of_place(module):
            assert torch.equal(with_tdhook("beta_smooth", module, x), ours)
        assert relative_errors(with_zennit("beta_smooth", module, x), ours)[0] > 0.1

    def test_merged_batch_norm_leaves_no_eps_behind(self) -> None:
        module = model("batch_normed_cnn", torch.float64)
        x = CASES["batch_normed_cnn"].inputs(5, torch.float64)
        ours = with_tdhook("epsilon_plus", module, x)
        theirs = with_zennit("epsilon_plus", module, x, exact=False)
        assert 1e-6 < relative_errors(ours, theirs)[0] < 1e-3

    def test_excitation_backprop_passes_activations(self) -> None:
        # Its probabilities go from neuron to neuron (Zhang et al. 2016), so an activation takes nothing. zennit leaves
        # it to the gradient, which is the same behind a ReLU alone.
        module = nn.Sequential(
            nn.Linear(5, 8, bias=False), nn.Softplus(), nn.Linear(8, 6, bias=False)
        ).double()
        for param in module.parameters():
            param.requires_grad_(False).abs_()
        x = torch.rand(5, 5, dtype=torch.float64)
        explained = module(x).gather(1, explained_outputs(module, x).unsqueeze(1))
        ours, theirs = both("excitation_backprop", module, x)
        torch.testing.assert_close(ours.sum(1, keepdim=True), explained, rtol=1e-4, atol=0)
        assert ((theirs.sum(1, keepdim=True) / explained - 1).abs() > 0.01).all()
