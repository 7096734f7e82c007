"""The forms that a batch comes in, and that a model returns: an explained module keeps them as the model does."""

from __future__ import annotations

import pytest
import torch
from formed import agents, batch, explain, q_of, same_without
from tensordict import (
    NonTensorData,
    TensorDict,
)
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdhook import LRP, Target


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize("inplace", [True, False, "empty"])
def test_a_module_that_returns_a_tensordict_of_its_own(layer, inplace):
    written = same_without(q_of(layer, inplace=inplace), batch)
    assert written["attr", "observation"].shape == (5, 4)


@pytest.mark.parametrize("batch_size", [(), (5,), (2, 3)])
def test_its_batch_size_is_that_of_the_model(layer, batch_size):
    def make():
        return TensorDict({"observation": torch.ones(*batch_size, 4)}, batch_size)

    assert same_without(q_of(layer, inplace="empty"), make).batch_size == batch_size
    assert same_without(q_of(layer, inplace=False), make).batch_size == ()


def test_layers_of_fixed_rank_that_return_a_tensordict_of_their_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(-1, (1, 2, 2)), nn.Conv2d(1, 2, 2), nn.Flatten(-3))
    td = TensorDict({"observation": torch.randn(2, 3, 4)}, [2, 3])
    written = explain(q_of(net, inplace=False), td)
    assert written["attr", "observation"].shape == (2, 3, 4) and "q" not in td


@pytest.mark.parametrize("inplace", [False, "empty"])
@pytest.mark.parametrize("selected", [None, ["q"]])
def test_a_sequence_that_returns_a_tensordict_of_its_own(layer, inplace, selected):
    sequence = TensorDictSequential(
        TensorDictModule(layer, ["observation"], ["hidden"]),
        TensorDictModule(nn.Linear(3, 2), ["hidden"], ["q"]),
        inplace=inplace,
        selected_out_keys=selected,
    )
    written = explain(sequence, td := batch(other=torch.zeros(5)))
    assert ("hidden" in written) == (selected is None) and "other" not in written
    assert written["attr", "observation"].shape == (5, 4) and set(td.keys()) == {"observation", "other"}


def test_only_selected_keys_are_written(layer):
    sequence = TensorDictSequential(
        TensorDictModule(layer, ["observation"], ["hidden"]),
        TensorDictModule(nn.Linear(3, 2), ["hidden"], ["q"]),
        selected_out_keys=["q"],
    )
    assert "hidden" not in same_without(sequence, batch)


class Anew(TensorDictModuleBase):
    """Returns a copy of what it is given, with an output."""

    in_keys, out_keys = ["observation"], ["q"]

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, td):
        return td.copy().set("q", self.layer(td["observation"]))


def test_a_module_that_returns_a_copy(layer):
    written = same_without(Anew(layer), lambda: batch(other=torch.zeros(5)))
    assert written["other"].shape == (5,)


def test_tensordict_out(layer):
    for model in (
        q_of(layer),
        q_of(layer, inplace=False),
        TensorDictSequential(q_of(layer), TensorDictModule(nn.ReLU(), ["q"], ["p"])),
    ):
        other = TensorDict({}, [5])
        td = batch()
        assert explain(model, td, tensordict_out=other) is other
        assert set(td.keys()) == {"observation"} and {"q", "attr", "ledger"} <= set(other.keys())
        locked = batch().lock_()
        assert "attr" in explain(model, locked, tensordict_out=TensorDict({}, [5]))


def test_arguments_that_would_be_ignored(layer):
    explained = LRP("epsilon", target="q").wrap(q_of(layer))
    with pytest.raises(
        TypeError, match="an explained module takes a TensorDict and tensordict_out=, and also got scale"
    ):
        explained(batch(), scale=2.0)


class Parts(nn.Module):
    """Returns a TensorDict of the batch of agents, and a text."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return TensorDict({"loc": self.layer(x)}, x.shape[:-1]), NonTensorData("text", batch_size=x.shape[:1])


def test_outputs_that_are_tensordicts_or_texts(layer):
    model = TensorDictModule(Parts(layer), [("agents", "observation")], ["out", "text"])
    written = same_without(model, agents, ("out", "loc"))
    assert written["out"].batch_size == (5, 3) and written["text"] == "text"


@pytest.mark.parametrize("names", [None, True])
def test_relevance_of_agents_has_their_axis(layer, names):
    model = TensorDictModule(layer, [("agents", "observation")], [("agents", "loc")])
    explained = LRP("epsilon", target=("agents", "loc"), values=True, attribute="all").wrap(model)
    written = explained(agents(names))
    for key in ("attr", "value"):
        assert written[key, "agents"].batch_size == written["agents"].batch_size == (5, 3)
        assert written[key, "agents"].names == written["agents"].names
    assert written["attr"].batch_size == (5,)
    assert written["attr", "agents", "loc"].shape == (5, 3, 3)


def test_relevance_for_several_outputs_of_agents(layer):
    model = TensorDictModule(
        nn.Sequential(layer, nn.Flatten(-2), nn.Linear(9, 2)), [("agents", "observation")], ["q"]
    )
    td = LRP("epsilon", target=Target("q", 0)).wrap(model)(agents())
    assert td["attr", "agents"].batch_size == (5, 3)
    td = LRP("epsilon", target=Target("q", "all")).wrap(model)(td)  # over what one target left
    assert td["attr", "agents", "observation"].shape == (5, 2, 3, 4)
    td = LRP("epsilon", target=Target("q", "all")).wrap(model)(agents(names=True))
    assert td["attr", "agents"].batch_size == (5, 2, 3) and td["attr", "agents"].names == ["b", None, "agent"]
    td = LRP("epsilon", target=Target("q", 0)).wrap(model)(td)
    assert td["attr", "agents", "observation"].shape == (5, 3, 4)


def test_deeper_entries_of_the_same_name(layer):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.y = layer, nn.Linear(4, 3)

        def forward(self, x, y):
            return self.x(x) + self.y(y)

    inner = TensorDict({"o": torch.ones(5, 3, 4), "deep": TensorDict({"o": torch.ones(5, 3, 4)}, [5])}, [5])
    td = TensorDict({"a": inner, "o": torch.ones(5, 3, 4)}, [5])
    written = explain(TensorDictModule(Sum(), [("a", "deep", "o"), "o"], [("z", "o")]), td, ("z", "o"))
    assert set(written["attr"].keys(True, True)) == {("a", "deep", "o"), "o"}
