"""What dictionaries are spliced behind: whatever a module returns, along any axis."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from autoencoders import Autoencoder, kept, mlp, observations, why
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from tolerances import assert_close
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import GradientTimesInput
from tdhook.concepts import Basis, Dictionary, Spliced, principal_components


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
