"""Dictionaries in a model: what it answers, what its features get, and what is absorbed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from autoencoders import Autoencoder, kept, mlp, observations, why
from tensordict import TensorDict
from tolerances import assert_close
from torch import Tensor, nn

from tdhook import LRP, Contrast, Target
from tdhook.attribution import Ablation, Gradient, GradientTimesInput, IntegratedGradients, Patching
from tdhook.composites import PRESETS
from tdhook.concepts import Basis, Spliced
from tdhook.rules import EpsilonRule, StopRule
from tdhook.selectors import Name, Type
from tdhook.targets import Through


class Planted(NamedTuple):
    """A model whose hidden state, behind module 2, is a code times a dictionary."""

    model: nn.Sequential
    atoms: Tensor
    td: TensorDict


def planted() -> Planted:
    """Each logit reads one feature, and no other: that of its own number, of twelve."""
    torch.manual_seed(0)
    atoms, mixing = torch.randn(12, 16).double(), torch.randn(12, 20).double()
    model = nn.Sequential(
        nn.Linear(20, 12, bias=False), nn.ReLU(), nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False)
    ).double()
    code = torch.rand(40, 12).double() * (torch.rand(40, 12) < 0.3)
    code[:, 0] += (code.sum(1) == 0).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.pinv(mixing).T)
        model[2].weight.copy_(atoms.T)
        model[3].weight.copy_(torch.linalg.pinv(atoms).T)
    return Planted(model, atoms, TensorDict({"input": code @ mixing}, [40]))


def test_the_planted_feature_has_the_relevance() -> None:
    model, atoms, td = planted()
    spliced = Spliced({"2": Basis(atoms)}).on(model)
    for preset in ("epsilon", "attn_lrp"):
        method = LRP(preset, target=Target("output", "argmax"), input_modules=["2.features"], ledger=True)
        explained = method.wrap(spliced)
        found = explained(td.clone())
        relevance = found["attr", "2.features"]
        right = relevance.gather(1, found["output"].argmax(1, keepdim=True)).squeeze(1)
        assert (right.abs() / relevance.abs().sum(1)).min() > 0.99
        assert found["ledger", "gap"].abs().max() < 1e-9
        assert abs(kept(explained, "reconstruction")) < 1e-9 * float(found["ledger", "target"].sum())


def test_features_and_the_error_have_the_relevance_of_what_was_encoded() -> None:
    model, atoms, td = planted()
    torch.manual_seed(3)
    found_atoms = atoms[:9] + 0.1 * torch.randn(9, 16).double()
    method = LRP("deeplift", target=Target("output", "argmax"), input_modules=["2"], ledger=True)
    whole = method.wrap(model)(td.clone())
    explained = method.asked(input_modules=["2.features"]).wrap(Spliced({"2": Basis(found_atoms)}).on(model))
    found = explained(td.clone())
    assert torch.equal(found["output"], whole["output"])
    error = sum(entry.of("reconstruction") for entry in explained.ledger.entries)
    relevance = found["attr", "2.features"].sum(1)
    assert_close(relevance + error, whole["attr", "2"].sum(1))
    assert error.abs().max() > 0.01
    arrived = found["ledger", "inputs"] + found["ledger", "absorbed"]
    assert_close(arrived, found["ledger", "target"])


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_conserves(preset: str, kind: str) -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24, kind).double(), "3": Autoencoder(6, 9).double()}).on(actor)
    out = actor(td.clone())["logits"]
    modified = preset in ("guided_backprop", "deconvnet", "beta_smooth")
    baseline = 0.0 if preset.startswith("deeplift_") else None
    method = why(preset, input_modules=["1.features", "3.features"], ledger=not modified, baseline=baseline)
    explained = method.wrap(spliced)
    if kind == "topk" and baseline is not None:
        with pytest.warns(UserWarning, match="scatter in `module.1.features` moves other values there"):
            found = explained(td.clone())
    else:
        found = explained(td.clone())
    assert torch.equal(found["logits"], out)
    assert found["attr", "1.features"].shape == (5, 24)
    assert found["attr", "3.features"].shape == (5, 9)
    if not modified:
        assert found["ledger", "gap"].abs().max() < 1e-9
        assert abs(kept(explained, "reconstruction")) > 1e-3


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_against_a_baseline_the_difference_of_the_error_is_absorbed(flow: Any) -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    method = why("epsilon", flow=flow, ledger=True, baseline=0.3, input_modules=["1.features"])
    explained = method.wrap(spliced)
    found = explained(td.clone())
    assert found["ledger", "gap"].abs().max() < 1e-9
    assert kept(explained, "reconstruction") != 0.0
    assert kept(explained, "constant") == 0.0


def test_gradients_go_through_the_dictionary() -> None:
    actor, td = mlp(), observations(5)
    dictionary = Autoencoder(8, 24).double()
    spliced = Spliced({"1": dictionary}).on(actor)
    found = Gradient(Target("logits", 0), signed=True, input_modules=["1.features"]).wrap(spliced)(td.clone())
    net = actor.module
    x = td["observation"].clone().requires_grad_()
    h = net[:2](x)
    features = dictionary.encode(h)
    made = dictionary.decode(features)
    logits = net[2:](made + (h - made).detach())[:, 0]
    there, here = torch.autograd.grad(logits.sum(), [features, x])
    assert_close(found["attr", "1.features"], there)
    assert_close(found["attr", "observation"], here)


def test_other_features_go_on_as_what_they_decode_to() -> None:
    actor, td = mlp(), observations(5)
    dictionary = Autoencoder(8, 24).double()
    spliced = Spliced({"1": dictionary}).on(actor)
    lost = Ablation(Target("logits", 0), input_modules=["1.features"], use_inputs=False).wrap(spliced)
    found = lost(td.clone())["attr", "1.features"]
    net = actor.module
    h = net[:2](td["observation"])
    features = dictionary.encode(h)
    for i in range(24):
        without = features.clone()
        without[:, i] = 0.0
        other = net[2:](h + dictionary.decode(without) - dictionary.decode(features))
        assert_close(found[:, i], (net[2:](h) - other)[:, 0].detach())


def test_patched_features_are_what_they_decode_to() -> None:
    actor, dictionary = mlp(), Autoencoder(8, 24).double()
    spliced = Spliced({"1": dictionary}).on(actor)
    torch.manual_seed(5)
    runs = {side: {"observation": torch.randn(5, 4).double()} for side in ("clean", "corrupt")}
    td = TensorDict(runs, [5])
    found = Patching("exact", Target("logits", 0), at=["1.features"]).wrap(spliced)(td.clone())
    net = actor.module
    h = net[:2](td["corrupt", "observation"])
    clean = dictionary.encode(net[:2](td["clean", "observation"]))
    corrupt = dictionary.encode(h)
    for i in range(24):
        patched = corrupt.clone()
        patched[:, i] = clean[:, i]
        other = net[2:](h + dictionary.decode(patched) - dictionary.decode(corrupt))
        assert_close(found["attr", "1.features"][:, i], (other - net[2:](h))[:, 0].detach())


def test_integrated_gradients_of_features_are_complete() -> None:
    actor, td = mlp(), observations(5)
    dictionary = Autoencoder(8, 24).double()
    spliced = Spliced({"1": dictionary}).on(actor)
    method = IntegratedGradients(
        Target("logits", 0), input_modules=["1.features"], use_inputs=False, steps=256, ledger=True
    )
    found = method.wrap(spliced)(td.clone())
    net = actor.module
    h = net[:2](td["observation"])
    zero = dictionary.decode(torch.zeros(24).double()) - dictionary.decode(dictionary.encode(h))
    rise = (net[2:](h) - net[2:](h + zero))[:, 0].detach()
    torch.testing.assert_close(found["attr", "1.features"].sum(1), rise, atol=1e-3, rtol=1e-3)
    assert torch.equal(found["logits"], actor(td.clone())["logits"])


def test_a_feature_is_explained() -> None:
    actor, td = mlp(), observations(5)
    dictionary = Autoencoder(8, 24).double()
    spliced = Spliced({"1": dictionary}).on(actor)
    target = Target(("1.features",), "argmax")
    found = GradientTimesInput(target, target_modules=["1.features"]).wrap(spliced)(td.clone())
    x = td["observation"].clone().requires_grad_()
    features = dictionary.encode(actor.module[:2](x))
    (grad,) = torch.autograd.grad(features.amax(1).sum(), x)
    assert_close(found["attr", "observation"], (grad * x).detach())


def test_the_ledger_has_a_column_where_something_is_kept_for_it() -> None:
    actor, td = mlp(), observations(5)
    plain = why("epsilon", ledger=True).wrap(actor)
    plain(td.clone())
    assert "reconstruction" not in plain.ledger.columns
    explained = why("epsilon", ledger=True).wrap(Spliced({"1": Autoencoder(8, 24).double()}).on(actor))
    explained(td.clone())
    assert explained.ledger.columns[-2:] == ("reconstruction", "gap")
    rows = [row for row in explained.ledger.cells() if row[1] == "restored()"]
    assert [row[0] for row in rows] == ["module.1.reconstruction"]
    assert float(rows[0][-3]) != 0.0
    assert "reconstruct" in str([column.header for column in explained.report().columns])
    assert "<th" in explained.ledger._repr_html_() and "reconstruction" in explained.ledger._repr_html_()


def test_layers_of_a_dictionary_are_matched_behind_a_layer_that_has_a_rule() -> None:
    spliced = Spliced({"2": Autoencoder(6, 24).double()}).on(mlp())
    plan = LRP([(nn.Linear, EpsilonRule(0.5))], target=Target("logits", 0)).plan(spliced, observations(5))
    layers = [(row.path, row.rule) for row in plan if isinstance(row.module, nn.Linear)]
    dictionary = "module.2.features.dictionary"
    paths = ["module.0", "module.2", f"{dictionary}.encoder", f"{dictionary}.decoder", "module.4"]
    assert layers == [(path, EpsilonRule(0.5)) for path in paths]


def test_a_feature_has_a_rule_of_its_own() -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    composite = [(Name("module.1.features"), StopRule()), *PRESETS["epsilon"]()]
    found = LRP(composite, target=Target("logits", 0), ledger=True).wrap(spliced)(td.clone())
    assert not found["attr", "observation"].any()
    assert found["ledger", "gap"].abs().max() < 1e-9


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_relevance_through_features_adds_up(flow: Any) -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    whole = why("epsilon", flow=flow).wrap(spliced)(td.clone())["attr", "observation"]
    each = Through(Target("logits", "argmax"), "1.features", units="all")
    found = LRP("epsilon", target=each, flow=flow).wrap(spliced)(td.clone())["attr", "observation"]
    assert found.shape == (5, 24, 4)
    assert_close(found.sum(1), whole)


def test_a_rule_for_the_whole_model() -> None:
    model = mlp().module
    td = TensorDict({"input": observations(5)["observation"]}, [5])
    spliced = Spliced({"2": Autoencoder(6, 9).double()}).on(model)
    composite = [(Type(nn.Sequential), EpsilonRule(0.0)), (nn.Linear, EpsilonRule(0.0))]
    method = LRP(composite, target=Target("output", 0), ledger=True)
    assert [row.path for row in method.plan(spliced)] == ["_around"]
    found = method.wrap(spliced)(td.clone())
    assert found["ledger", "gap"].abs().max() < 1e-9
    gradients = GradientTimesInput(Target("output", 0)).wrap(spliced)(td.clone())
    assert_close(found["attr", "input"], gradients["attr", "input"])


def test_contrasts_and_several_targets() -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    each = LRP("epsilon", target=Target("logits", "all"), input_modules=["1.features"]).wrap(spliced)(
        td.clone()
    )
    assert each["attr", "1.features"].shape == (5, 3, 24)
    why_not = Contrast(Target("logits", 0), Target("logits", 1))
    one = LRP("epsilon", target=why_not, input_modules=["1.features"]).wrap(spliced)(td.clone())
    both = each["attr", "1.features"][:, 0] - each["attr", "1.features"][:, 1]
    assert_close(one["attr", "1.features"], both)
