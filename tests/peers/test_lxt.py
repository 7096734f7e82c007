"""AttnLRP and CP-LRP equal LXT's efficient implementation, on the transformers that LXT knows.

LXT is the implementation of AttnLRP by its authors (Achtibat et al. 2024): it patches the classes of each architecture
so that gradient times input is relevance. Here nothing is patched, and the same rules reach the same operations.

Models are in double precision, and relevance is that of each token: the sum over its embedding. RMS normalisation as
the transformers library and LXT write it computes in single precision whatever the model is in, so both libraries
round there; what is called exact here leaves that out, and the 1e-10 that LXT adds to the arguments of activations.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.composites import Composite
from tdhook.relevance.composites.composite import preset
from tdhook.rules import ConstantRule
from tdhook.selectors import Name

from .transformer_models import ATTENTION, CASES, answer, in_double, tokens

REASON = "lxt is not installed; `nox -s peers` installs it"
pytest.importorskip("transformers", reason=REASON)
pytest.importorskip("lxt", reason=REASON)

pytestmark = pytest.mark.peers

TESTS = Path(__file__).parents[1]
GATED = ("llama", "qwen2", "qwen3", "gemma3")
WITH_CP_LRP = ("gpt2", *GATED)  # LXT has none for BERT
AS_THEY_ARE, EXACT = 1e-6, 1e-9

all_cases = pytest.mark.parametrize("name", CASES)
each_attention = pytest.mark.parametrize("attention", ATTENTION)


@functools.cache
def references(rules: str) -> dict[tuple[str, str, bool], dict[str, Tensor]]:
    """What LXT finds under ``rules``, by model, way of computing attention, and whether exactly."""
    names = CASES if rules == "attnLRP" else WITH_CP_LRP
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "references.pt")
        command = [sys.executable, "-m", "peers.lxt_reference", str(file), rules, *names]
        subprocess.run(command, cwd=TESTS, check=True, capture_output=True)
        found: dict[tuple[str, str, bool], dict[str, Tensor]] = torch.load(file, weights_only=True)
    return found


class Answering(nn.Module):
    """A transformer as a function from tokens to the logits of its answer."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor) -> Tensor:
        return answer(self.transformer(input_ids=input_ids).logits)


@functools.cache
def explain(
    name: str,
    attention: str,
    composite: Any,
    *,
    flow: str = "gradient",
    exact: bool = True,
    ledger: bool = False,
) -> TensorDict:
    """What this library finds: the model's output, the ledger, and at ``"tokens"`` the relevance of each token."""
    case = CASES[name]
    path = f"transformer.{case.embedding}"
    method = LRP(
        composite,
        target=Target("output", "argmax"),
        use_inputs=False,
        input_modules=[path],
        flow=flow,
        on_unmatched="raise",
        ledger=ledger,
    )
    ids = tokens()
    model = Answering(case.build(attention))
    with in_double(case.source) if exact else nullcontext(), method.prepare(model) as explained:
        td = explained(TensorDict({"input": ids}, [len(ids)]))
    return td.set("tokens", td["attr", path].sum(-1))


def cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each sample."""
    return torch.cosine_similarity(ours, theirs, dim=-1)


def errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each sample, relative to its own size."""
    return torch.linalg.vector_norm(ours - theirs, dim=-1) / torch.linalg.vector_norm(theirs, dim=-1)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    assert (theirs.abs().amax(-1) > 1e-3).all(), "nothing to compare"
    assert (cosines(ours, theirs) > 1 - 1e-9).all()
    assert (errors(ours, theirs) < tolerance).all(), f"relative errors {errors(ours, theirs).tolist()}"


def compare(name: str, attention: str, composite: Any, rules: str, *, exact: bool) -> None:
    theirs = references(rules)[name, attention, exact]
    td = explain(name, attention, composite, exact=exact)
    # The very same model; in single precision, LXT's way of writing a normalisation rounds otherwise.
    assert_same(td["output"], theirs["logits"], EXACT if exact else AS_THEY_ARE)
    assert_same(td["tokens"], theirs["relevance"], EXACT if exact else AS_THEY_ARE)


@pytest.mark.parametrize("exact", [False, True], ids=["as_they_are", "exact"])
@each_attention
@all_cases
def test_attn_lrp(name: str, attention: str, exact: bool) -> None:
    compare(name, attention, "attn_lrp", "attnLRP", exact=exact)


@pytest.mark.parametrize("exact", [False, True], ids=["as_they_are", "exact"])
@each_attention
def test_cp_lrp(attention: str, exact: bool) -> None:
    compare("gpt2", attention, "cp_lrp", "cp_LRP", exact=exact)


@all_cases
def test_the_two_methods_differ(name: str) -> None:
    # So that a comparison with the wrong one of them would fail.
    relevance = [explain(name, "sdpa", composite)["tokens"] for composite in ("attn_lrp", "cp_lrp")]
    assert (errors(*relevance) > 1e-3).all()
    plain = plain_gradient(name)
    assert (errors(relevance[0], plain) > 1e-3).all()


def plain_gradient(name: str) -> Tensor:
    """Gradient times input of the model as it is."""
    case = CASES[name]
    model = case.build("sdpa")
    embedded = model.get_submodule(case.embedding)(tokens()).requires_grad_()
    logits = answer(model(inputs_embeds=embedded).logits)
    (grad,) = torch.autograd.grad(logits.amax(-1).sum(), embedded)
    return (grad * embedded).sum(-1).detach()


@pytest.mark.parametrize("composite", ["attn_lrp", "cp_lrp"])
@each_attention
@all_cases
def test_both_flows_agree(name: str, attention: str, composite: str) -> None:
    gradient, relevance = (
        explain(name, attention, composite, flow=flow)["tokens"] for flow in ("gradient", "relevance")
    )
    assert_same(relevance, gradient, 1e-6)


@pytest.mark.parametrize("flow", ["gradient", "relevance"])
@pytest.mark.parametrize("composite", ["attn_lrp", "cp_lrp"])
@all_cases
def test_keeping_accounts_changes_nothing(name: str, composite: str, flow: str) -> None:
    plain = explain(name, "sdpa", composite, flow=flow)["tokens"]
    td = explain(name, "sdpa", composite, flow=flow, ledger=True)
    assert_same(td["tokens"], plain, EXACT)
    assert (td["ledger", "gap"].abs() <= 1e-6 * td["ledger", "target"].abs()).all()


class TestKnownDifferences:
    """Where LXT does something else, and which side the papers are on."""

    @pytest.mark.parametrize("name", GATED)
    @each_attention
    def test_cp_lrp_of_a_gated_mlp(self, name: str, attention: str) -> None:
        # `act(gate(x)) * up(x)`: LXT holds the gate constant under CP-LRP too. The paper that CP-LRP is from (Ali et
        # al. 2022) has two rules, for attention ("AH") and for normalisation ("LN"), and no gated model. Here CP-LRP
        # is AttnLRP but for these two, so a product of two activations is shared equally (AttnLRP, Prop. 3.3).
        theirs = references("cp_LRP")[name, attention, True]["relevance"]
        ours = explain(name, attention, "cp_lrp")["tokens"]
        assert (errors(ours, theirs) > 0.05).all() and (cosines(ours, theirs) < 0.999).all()
        # With one more pair that holds the gates constant, the two are the same.
        constant_gates = Composite([(Name("*.mlp.act_fn"), ConstantRule()), *preset("cp_lrp")])
        assert_same(explain(name, attention, constant_gates)["tokens"], theirs, EXACT)

    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    def test_either_way_of_sharing_a_gated_product_conserves(self, name: str) -> None:
        # There are no biases, and under CP-LRP nothing else keeps relevance: the difference above is one of who gets
        # it, not of how much there is.
        theirs = references("cp_LRP")[name, "sdpa", True]
        explained = theirs["logits"].amax(-1)
        ours = explain(name, "sdpa", "cp_lrp")["tokens"].sum(-1)
        torch.testing.assert_close(theirs["relevance"].sum(-1), explained, rtol=1e-4, atol=0)
        torch.testing.assert_close(ours, explained, rtol=1e-4, atol=0)

    def test_the_argument_of_an_activation_is_stabilised_with_its_sign(self) -> None:
        # The identity rule is `R_x = R_z` (AttnLRP, eq. 9), in the gradient convention `g_x = g_z z / x`. LXT divides
        # by `x + 1e-10`, whatever the sign of `x`, which is zero at -1e-10; here the stabiliser never nears zero.
        from lxt.efficient.rules import identity_rule_implicit

        x = torch.tensor([[-1e-10, -2e-10, 1.0]], dtype=torch.float64, requires_grad=True)
        (theirs,) = torch.autograd.grad(identity_rule_implicit(nn.functional.silu, x).sum(), x)
        assert theirs[0, 0].isinf()
        assert theirs[0, 1] == pytest.approx(1.0, rel=1e-3)  # twice the slope, which is a half
        for index in (0, 1):
            method = LRP("attn_lrp", target=Target("output", index), flow="gradient")
            with method.prepare(nn.SiLU()) as explained:
                ours = explained(TensorDict({"input": x.detach()}, [1]))["attr", "input"] / x.detach()
            assert ours[0, index] == pytest.approx(0.5, rel=0.02)

    @pytest.mark.parametrize("name", ["gpt2", "bert"])
    def test_that_stabiliser_is_all_that_shows(self, name: str) -> None:
        # No normalisation in single precision here: what is left as the libraries are is LXT's 1e-10.
        td = explain(name, "sdpa", "attn_lrp", exact=False)
        as_it_is, exact = (references("attnLRP")[name, "sdpa", e]["relevance"] for e in (False, True))
        assert errors(td["tokens"], as_it_is).max() > 10 * errors(td["tokens"], exact).max()

    @pytest.mark.parametrize("name", GATED)
    def test_normalisation_in_single_precision_separates_the_flows(self, name: str) -> None:
        # Whatever travels through a cast to single precision is rounded: relevance in one flow, relevance per unit of
        # activation in the other. So the flows differ by what single precision can hold, and not by 1e-9.
        gradient, relevance = (
            explain(name, "sdpa", "attn_lrp", flow=flow, exact=False)["tokens"]
            for flow in ("gradient", "relevance")
        )
        assert_same(relevance, gradient, 1e-5)
        assert errors(relevance, gradient).max() > 1e-9
