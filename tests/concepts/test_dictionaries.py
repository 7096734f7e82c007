"""Dictionaries in a model: what it answers, what its features get, and what is absorbed."""

from __future__ import annotations

import copy
import pickle
import re
from threading import Thread
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from tolerances import assert_close
from torch import Tensor, nn

from tdhook import LRP, Contrast, Target
from tdhook.attribution import Ablation, Gradient, GradientTimesInput, IntegratedGradients
from tdhook.composites import PRESETS
from tdhook.concepts import Basis, Dictionary, Spliced, principal_components
from tdhook.rules import EpsilonRule, StopRule
from tdhook.selectors import Name
from tdhook.targets import Through


class Autoencoder(nn.Module):
    """Sparse autoencoders as they are written: ``kind`` says what keeps them sparse."""

    def __init__(self, width: int, features: int, kind: str = "relu", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = nn.Linear(width, features), nn.Linear(features, width)
        self.kind = kind

    def encode(self, h: Tensor) -> Tensor:
        z = self.encoder(h - self.decoder.bias)
        if self.kind == "jumprelu":
            return z * (z > 0.2)
        z = torch.relu(z)
        if self.kind == "topk":
            values, index = z.topk(4, -1)
            return torch.zeros_like(z).scatter_(-1, index, values)
        return z

    def decode(self, features: Tensor) -> Tensor:
        made: Tensor = self.decoder(features)
        return made


class Block(nn.Module):
    """Returns a tuple, as blocks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + torch.relu(self.mlp(x)), None


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        logits: Tensor = self.head(x).mean(-2)
        return logits


def mlp() -> TensorDictModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return TensorDictModule(net, ["observation"], ["logits"])


def observations(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"observation": torch.randn(*batch, 4).double()}, list(batch))


def why(preset: str, **options: Any) -> LRP:
    composite = PRESETS[preset](-3.0, 3.0) if preset == "epsilon_gamma_box" else preset
    return LRP(composite, target=Target("logits", "argmax"), on_unmatched="raise", **options)


def kept(explained: Any, reason: str) -> float:
    return float(sum(entry.of(reason).sum() for entry in explained.ledger.entries))


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


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_batch(batch: tuple[int, ...]) -> None:
    actor, td = mlp(), observations(*batch)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    found = why("epsilon", input_modules=["1.features"]).wrap(spliced)(td.clone())
    assert found["attr", "1.features"].shape == (*batch, 24)
    assert found["attr", "observation"].shape == (*batch, 4)
    rows = why("epsilon", input_modules=["1.features"]).wrap(spliced)(td.reshape(-1))
    assert_close(found["attr", "1.features"].reshape(-1, 24), rows["attr", "1.features"])


def test_channels_of_pictures() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    actor = TensorDictModule(net, ["pixels"], ["logits"])
    td = TensorDict({"pixels": torch.randn(2, 3, 3, 8, 8).double()}, [2, 3])
    pictures = net[:2](td["pixels"].flatten(0, 1)).detach()
    basis = principal_components(pictures.movedim(1, -1), 4)
    found = {}
    for axis in (1, -3):
        spliced = Spliced({"1": basis}, axis=axis).on(actor)
        explained = why("epsilon_plus", input_modules=["1.features"], ledger=True, values=True).wrap(spliced)
        found[axis] = explained(td.clone())
        assert found[axis]["ledger", "gap"].abs().max() < 1e-9
        assert found[axis]["attr", "1.features"].shape == (2, 3, 4, 6, 6)
        values = found[axis]["value", "1.features"].flatten(0, 1).movedim(1, -1)
        assert_close(values, basis.encode(pictures.movedim(1, -1)))
        assert torch.equal(found[axis]["logits"].flatten(0, 1), net(td["pixels"].flatten(0, 1)).detach())
    assert_close(found[1]["attr", "1.features"], found[-3]["attr", "1.features"])


def test_blocks_that_return_tuples() -> None:
    torch.manual_seed(0)
    actor = TensorDictModule(Blocks().double(), ["tokens"], ["logits"])
    td = TensorDict({"tokens": torch.randn(3, 7, 5).double()}, [3])
    dictionaries = {"blocks.0": Autoencoder(5, 15).double(), "blocks[1]": Autoencoder(5, 10).double()}
    spliced = Spliced(dictionaries, axis=-1, element=0).on(actor)
    names = ["blocks.0.features", "blocks[1].features"]
    found = why("attn_lrp", input_modules=names, ledger=True).wrap(spliced)(td.clone())
    assert torch.equal(found["logits"], actor(td.clone())["logits"])
    assert found["attr", "blocks.0.features"].shape == (3, 7, 15)
    assert found["attr", "blocks[1].features"].shape == (3, 7, 10)
    assert found["ledger", "gap"].abs().max() < 1e-9


class Named(NamedTuple):
    hidden: Tensor
    rest: Tensor


class OfManyForms(nn.Module):
    """Returns what it computes in one of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inside, self.form = Form(form), form
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.inside(x)
        logits: Tensor = self.head(found[0] if self.form in ("list", "named") else found["hidden"])
        return logits


class Form(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> object:
        if self.form == "named":
            return Named(x * 2, x)
        return [x * 2, x] if self.form == "list" else {"hidden": x * 2, "rest": x}


@pytest.mark.parametrize("form, element", [("named", 0), ("list", 0), ("dict", "hidden")])
def test_an_element_of_what_a_module_returns(form: str, element: int | str) -> None:
    torch.manual_seed(0)
    model, td = OfManyForms(form).double(), TensorDict({"input": torch.randn(3, 5).double()}, [3])
    spliced = Spliced({"inside": Autoencoder(5, 10).double()}, element={"inside": element}).on(model)
    found = GradientTimesInput(Target("output", 0), input_modules=["inside.features"]).wrap(spliced)(
        td.clone()
    )
    assert torch.equal(found["output"], model(td["input"]).detach())
    assert found["attr", "inside.features"].abs().sum() > 0


def test_a_key_of_a_sequence() -> None:
    torch.manual_seed(0)
    actor = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 8), ["observation"], ["hidden"]),
        TensorDictModule(nn.Linear(8, 3), ["hidden"], ["logits"]),
    ).double()
    spliced = Spliced({"0": Autoencoder(8, 24).double()}, element="hidden").on(actor)
    explained = why("epsilon", input_modules=["0.features"], ledger=True).wrap(spliced)
    found = explained(observations(5))
    assert torch.equal(found["logits"], actor(observations(5))["logits"])
    assert torch.equal(found["hidden"], actor(observations(5))["hidden"])
    assert found["ledger", "gap"].abs().max() < 1e-9
    assert abs(kept(explained, "reconstruction")) > 1e-3


def test_a_module_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.relu(self.layer(torch.relu(self.layer(x)))))
            return logits

    actor = TensorDictModule(Twice().double(), ["observation"], ["logits"])
    spliced = Spliced({"layer": Autoencoder(4, 12).double()}).on(actor)
    found = why("epsilon", input_modules=["layer.features"], ledger=True).wrap(spliced)(observations(5))
    assert found["attr", "layer.features"].shape == found["attr", "layer.features:1"].shape == (5, 12)
    assert found["ledger", "gap"].abs().max() < 1e-9


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


def test_as_one_graph() -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24, "topk").double()}).on(actor)
    eager = why("epsilon", input_modules=["1.features"]).wrap(spliced)(td.clone())
    compiled = why("epsilon", input_modules=["1.features"], compile=True).wrap(spliced)(td.clone())
    for key in ("logits", ("attr", "1.features"), ("attr", "observation")):
        assert_close(compiled[key], eager[key])


def test_the_model_is_left_as_it_is() -> None:
    actor, td = mlp(), observations(5)
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    modules = list(actor.modules())
    dictionary = Autoencoder(8, 24).double()
    spliced = Spliced({"1": dictionary}).on(actor)
    why("epsilon", input_modules=["1.features"]).wrap(spliced)(td.clone())
    spliced(td.clone())
    with pytest.raises(ValueError, match="does not encode"):
        Spliced({"1": Autoencoder(5, 24).double()}).on(actor)(td.clone())
    assert list(actor.modules()) == modules
    assert not any(module._forward_hooks for module in (*modules, *spliced.modules()))
    assert all(torch.equal(value, before[name]) for name, value in actor.state_dict().items())
    assert set(before) < set(spliced.state_dict())
    assert "beside.module.1.features.dictionary.encoder.weight" in spliced.state_dict()
    assert spliced.get_parameter("module.0.weight") is actor.module[0].weight
    spliced.load_state_dict(spliced.state_dict())
    explained = why("epsilon").wrap(spliced)
    explained.load_state_dict(spliced.state_dict())
    spliced.eval()
    assert not actor.training and not actor.module.training and not dictionary.training
    spliced.float()
    assert actor.module[0].weight.dtype is dictionary.encoder.weight.dtype is torch.float32


def test_a_hook_on_features_puts_others_in_their_place() -> None:
    actor, td = mlp(), observations(5)
    dictionary = Autoencoder(8, 24).double()
    spliced = Spliced({"1": dictionary}).on(actor)
    hook = spliced.feature_modules["1"].register_forward_hook(lambda module, args, found: 2 * found)
    found = spliced(td.clone())["logits"]
    hook.remove()
    h = actor.module[:2](td["observation"])
    features = dictionary.encode(h)
    other = actor.module[2:](h + dictionary.decode(2 * features) - dictionary.decode(features))
    assert_close(found, other)
    assert torch.equal(spliced(td.clone())["logits"], actor(td.clone())["logits"])


def test_copies_and_pickles() -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    method = why("epsilon", input_modules=["1.features"])
    found = method.wrap(spliced)(td.clone())
    for other in (copy.deepcopy(spliced), pickle.loads(pickle.dumps(spliced))):
        with torch.no_grad():
            actor.module[0].weight.add_(1.0)
        again = method.wrap(other)(td.clone())
        assert torch.equal(again["attr", "1.features"], found["attr", "1.features"])
        with torch.no_grad():
            actor.module[0].weight.sub_(1.0)


def test_threads() -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    method, out = why("epsilon", input_modules=["1.features"]), actor(td.clone())["logits"]
    expected = method.wrap(spliced)(td.clone())["attr", "1.features"]
    found: list[Tensor] = []
    plain: list[Tensor] = []

    def explain() -> None:
        found.append(method.wrap(spliced)(td.clone())["attr", "1.features"])

    def act() -> None:
        plain.extend(actor(td.clone())["logits"] for _ in range(50))

    threads = [Thread(target=explain) for _ in range(4)] + [Thread(target=act)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(one, expected) for one in found)
    assert len(plain) == 50 and all(torch.equal(one, out) for one in plain)


def test_a_model_of_another_precision() -> None:
    actor, td = mlp().bfloat16(), observations(5).to(torch.bfloat16)
    spliced = Spliced({"1": Autoencoder(8, 24)}).on(actor)
    found = why("attn_lrp", input_modules=["1.features"], ledger=True).wrap(spliced)(td.clone())
    assert torch.equal(found["logits"], actor(td.clone())["logits"])
    assert found["attr", "1.features"].dtype is torch.float32
    assert found["attr", "observation"].dtype is torch.bfloat16
    assert found["ledger", "gap"].abs().max() < 0.02


def test_under_autocast() -> None:
    actor, td = mlp().float(), observations(5).float()
    spliced = Spliced({"1": Autoencoder(8, 24)}).on(actor)
    explained = why("attn_lrp", input_modules=["1.features"]).wrap(spliced)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = explained(td.clone())
        assert torch.equal(found["logits"], actor(td.clone())["logits"])


def test_dictionaries_one_after_the_other() -> None:
    actor, td = mlp(), observations(5)
    dictionaries = {"1": Autoencoder(8, 24).double(), "3": Autoencoder(6, 9).double()}
    names = ["1.features", "3.features"]
    method = why("epsilon", input_modules=names)
    together = method.wrap(Spliced(dictionaries).on(actor))(td.clone())
    first = Spliced({"1": dictionaries["1"]}).on(actor)
    found = method.wrap(Spliced({"3": dictionaries["3"]}).on(first))(td.clone())
    for name in names:
        assert torch.equal(found["attr", name], together["attr", name])


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_relevance_through_features_adds_up(flow: Any) -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    whole = why("epsilon", flow=flow).wrap(spliced)(td.clone())["attr", "observation"]
    each = Through(Target("logits", "argmax"), "1.features", units="all")
    found = LRP("epsilon", target=each, flow=flow).wrap(spliced)(td.clone())["attr", "observation"]
    assert found.shape == (5, 24, 4)
    assert_close(found.sum(1), whole)


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


def test_a_pair_of_functions_and_what_is_a_dictionary() -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": (nn.Linear(8, 3).double(), nn.Linear(3, 8).double())}).on(actor)
    assert "beside.module.1.features.dictionary.encode.weight" in spliced.state_dict()
    found = why("epsilon", input_modules=["1.features"]).wrap(spliced)(td.clone())
    assert found["attr", "1.features"].shape == (5, 3)
    assert isinstance(Basis(torch.eye(3)), Dictionary)
    assert repr(Spliced({"1": Basis(torch.eye(3))})) == "Spliced({'1': Basis})"


ERRORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no module": ({"9": Autoencoder(8, 24)}, {}, "the model has no module '9'"),
    "twice": (
        {"1": Autoencoder(8, 24), "module.1": Autoencoder(8, 24)},
        {},
        "two dictionaries are at 'module.1', which is one module: name it once",
    ),
    "no dictionary": ({}, {}, "Spliced takes at least one dictionary by the path of a module"),
    "what is none": (
        {"1": torch.eye(8)},
        {},
        "the dictionary at '1' is Tensor: give an object with encode and decode, or a pair of functions (encode, "
        "decode); a matrix of components as Basis(components)",
    ),
    "another width": (
        {"1": Autoencoder(5, 24)},
        {},
        "the dictionary at '1' does not encode 8 values, the width of [5, 8] along axis -1",
    ),
    "no features": (
        {"1": (lambda h: h.sum(-1), lambda f: f)},
        {},
        "the dictionary at '1' encodes [5, 8] as a tensor of shape [5]: one tensor of shape [5, 'features'] is what it "
        "should return",
    ),
    "a tuple": ({"1": (lambda h: (h, h), lambda f: f)}, {}, "encodes [5, 8] as tuple of 2"),
    "another shape": (
        {"1": (lambda h: h, lambda f: f[..., :2])},
        {},
        "the dictionary at '1' decodes to a tensor of shape [5, 2], and [5, 8] was encoded",
    ),
    "the batch": ({"1": Autoencoder(8, 24)}, {"axis": 0}, "axis=0 of '1' is that of the batch"),
    "no such axis": (
        {"1": Autoencoder(8, 24)},
        {"axis": 2},
        "axis=2 is none of the features of '1', whose output is of shape [5, 8], of which 1 are axes of the batch",
    ),
    "no such path": (
        {"1": Autoencoder(8, 24)},
        {"axis": {"2": 1}},
        "axis names '2', where there is no dictionary; there are dictionaries at '1'",
    ),
    "no element": ({"1": Autoencoder(8, 24)}, {"element": "h"}, "which has no element 'h'"),
}


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_errors(name: str) -> None:
    dictionaries, options, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Spliced(dictionaries, **options).on(mlp().float())(observations(5).float())


def test_errors_of_blocks() -> None:
    torch.manual_seed(0)
    actor = TensorDictModule(Blocks(), ["tokens"], ["logits"])
    td = TensorDict({"tokens": torch.randn(3, 7, 5)}, [3])
    sae = Autoencoder(5, 15)
    with pytest.raises(
        ValueError, match=r"'blocks.0' returns tuple of 2: say which element is encoded, elem"
    ):
        Spliced({"blocks.0": sae}).on(actor)(td.clone())
    with pytest.raises(
        TypeError, match=r"what is encoded at 'blocks.0' is NoneType, and no floating-point tens"
    ):
        Spliced({"blocks.0": sae}, element=1).on(actor)(td.clone())
    with pytest.raises(
        ValueError, match=r"shape \[3, 7, 5\], of which 1 are axes of the batch: say which axis"
    ):
        Spliced({"blocks.0": sae}, element=0).on(actor)(td.clone())


def test_a_module_that_is_not_called() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    spliced = Spliced({"unused": Autoencoder(3, 9)}).on(model)
    with pytest.raises(RuntimeError, match="did not call 'unused', behind which there is a dictionary"):
        spliced(TensorDict({"input": torch.randn(2, 4)}, [2]))


def test_a_name_that_is_taken() -> None:
    model = nn.Sequential(nn.ModuleDict({"features": nn.Linear(4, 3)}))
    with pytest.raises(
        ValueError, match=r"the model has a module '0.features', where what is spliced in would be"
    ):
        Spliced({"0": Autoencoder(3, 9)}).on(model)
