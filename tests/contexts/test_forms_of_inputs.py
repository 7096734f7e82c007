"""What a model is given: tensorclasses, lazy stacks, texts, names of axes, and what need not be there."""

from __future__ import annotations

import pytest
import torch
from formed import OBSERVATION, batch, explain, q_of, same_without
from tensordict import (
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    lazy_stack,
    tensorclass,
)
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, WrapModule
from torch import nn

from tdhook import LRP, Target
from tdhook.attribution import Ablation, GradientTimesInput, IntegratedGradients


@tensorclass
class Inner:
    x: torch.Tensor
    name: str = "inner"


@tensorclass
class Step:
    observation: torch.Tensor
    inner: Inner | None = None
    q: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None
    attr: TensorDict | None = None
    ledger: TensorDict | None = None


@tensorclass
class Bare:
    observation: torch.Tensor
    q: torch.Tensor | None = None


class ByAttribute(TensorDictModuleBase):
    """Reads a tensorclass as its users do."""

    in_keys, out_keys = ["observation"], ["q"]

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, step):
        step.q = self.layer(step.observation)
        return step


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize("model", [q_of, ByAttribute])
@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus_flat"])
def test_a_tensorclass(layer, model, composite):
    step = Step(OBSERVATION.clone(), batch_size=[5])
    explained = LRP(composite, target=Target("q", "argmax"), ledger=True).wrap(model(layer))
    assert explained(step) is step
    expected = LRP(composite, target=Target("q", "argmax")).wrap(q_of(layer))(batch())
    assert torch.equal(step.q, expected["q"])
    assert torch.equal(step.attr["observation"], expected["attr", "observation"])
    assert step.ledger["gap"].abs().max() < 1e-6


@pytest.mark.parametrize("method", [GradientTimesInput, IntegratedGradients, Ablation])
def test_a_tensorclass_and_other_methods(layer, method):
    for model in (q_of, ByAttribute):
        explained = method(target=Target("q", "argmax")).wrap(model(layer))
        step = explained(Step(OBSERVATION.clone(), batch_size=[5]))
        assert step.attr["observation"].shape == (5, 4)


def test_a_nested_tensorclass(layer):
    step = Step(OBSERVATION.clone(), inner=Inner(OBSERVATION.clone(), batch_size=[5]), batch_size=[5])
    model = TensorDictModule(layer, [("inner", "x")], ["q"])
    assert explain(model, step).attr["inner", "x"].shape == (5, 4)
    td = TensorDict({"inner": step.inner}, [5])
    assert explain(model, td)["attr", "inner", "x"].shape == (5, 4)
    assert td["inner"].name == "inner"


def test_a_whole_tensorclass_as_one_input(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, inner):
            return self.layer(inner.x)

    td = TensorDict({"inner": Inner(OBSERVATION.clone(), batch_size=[5])}, [5])
    assert explain(TensorDictModule(Net(), ["inner"], ["q"]), td)["attr", "inner", "x"].shape == (5, 4)


def test_a_tensorclass_without_a_field_for_relevance(layer):
    step = Bare(OBSERVATION.clone(), batch_size=[5])
    text = r"Bare has no field 'attr', where \('attr', 'observation'\) is written; declare `attr: TensorDict \| None"
    with pytest.raises(ValueError, match=text):
        LRP("epsilon", target="q").wrap(q_of(layer))(step)
    assert step.q is None


def ragged(batch_size=(), stack_dim=0):
    def element(i):
        entries = {
            "observation": torch.full((*batch_size, 4), i + 1.0),
            "extra": torch.ones(*batch_size, i + 1),
        }
        return TensorDict(entries, batch_size)

    return lazy_stack([element(i) for i in range(3)], stack_dim)


@pytest.mark.parametrize("batch_size, stack_dim", [((), 0), ((5,), 0), ((5,), 1)])
def test_a_lazy_stack_with_ragged_entries_that_nobody_reads(layer, batch_size, stack_dim):
    td = ragged(batch_size, stack_dim)
    assert explain(q_of(layer), td) is td
    dense = TensorDict({"observation": td["observation"]}, td.batch_size)
    expected = explain(q_of(layer), dense)
    assert torch.equal(td["attr", "observation"], expected["attr", "observation"])
    assert [element["extra"].shape[-1] for element in td.tensordicts] == [1, 2, 3]


def test_a_lazy_stack_of_elements_with_keys_of_their_own(layer):
    td = lazy_stack(
        [TensorDict({"observation": torch.ones(4), f"only {i}": torch.ones(1)}, []) for i in range(3)]
    )
    assert explain(q_of(layer), td)["attr", "observation"].shape == (3, 4)


@pytest.mark.parametrize("even", [True, False])
def test_a_lazy_stack_below(layer, even):
    def make():
        elements = [
            TensorDict(
                {"observation": torch.ones(5, 4) * i, "extra": torch.ones(5, 1 if even else i + 1)}, [5]
            )
            for i in range(3)
        ]
        return TensorDict({"agents": lazy_stack(elements, 1)}, [5])

    model = TensorDictModule(layer, [("agents", "observation")], [("agents", "loc")])
    td = explain(model, make(), ("agents", "loc"))
    assert td["attr", "agents", "observation"].shape == (5, 3, 4)
    assert td["attr", "agents"].batch_size == (5, 3)
    assert set(td.keys()) == {"agents", "attr", "ledger"}
    assert td["agents"][:, 2]["extra"].shape == (5, 1 if even else 3)


def test_a_ragged_entry_that_is_read(layer):
    text = "entry 'extra' has other shapes in other elements of the lazy stack"
    with pytest.raises(KeyError, match=text):
        explain(TensorDictModule(layer, ["extra"], ["q"]), ragged())


def test_texts_and_other_objects_stay(layer):
    def make():
        return batch(text="one", texts=NonTensorStack(*map(str, range(5))))

    same_without(q_of(layer), make)
    lazy = lazy_stack([TensorDict({"observation": torch.ones(4), "text": str(i)}, []) for i in range(3)])
    assert explain(q_of(layer), lazy)["attr", "observation"].shape == (3, 4)
    assert lazy[1]["text"] == "1"


class Told(nn.Module):
    """Reads texts, and says so."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, texts):
        lengths = torch.tensor([float(len(text)) for text in texts])
        return self.layer(x) * lengths.unsqueeze(-1), NonTensorStack(*map(str.upper, texts))


def test_texts_that_the_model_reads_and_writes(layer):
    def make():
        return batch(texts=NonTensorStack("a", "bb", "ccc", "dd", "e"))

    model = TensorDictModule(Told(layer), ["observation", "texts"], ["q", "loud"])
    assert same_without(model, make)["loud"] == ["A", "BB", "CCC", "DD", "E"]
    lazy = lazy_stack(list(make().unbind(0)))
    assert explain(model, lazy)["loud"] == ["A", "BB", "CCC", "DD", "E"]


def test_names_of_axes(layer):
    def make():
        return TensorDict({"observation": torch.ones(2, 3, 4)}, [2, 3], names=["b", "time"])

    written = same_without(q_of(layer), make)
    assert written.names == written["attr"].names == ["b", "time"]
    assert same_without(q_of(layer, inplace="empty"), make).batch_size == (2, 3)


def test_on_disk(layer, tmp_path):
    stored = batch().memmap(tmp_path)
    with pytest.raises(RuntimeError, match="Cannot modify locked TensorDict"):
        explain(q_of(layer), stored)
    assert set(stored.keys()) == {"observation"}
    assert explain(q_of(layer), stored.copy())["attr", "observation"].shape == (5, 4)
    assert explain(q_of(layer, inplace=False), stored)["attr", "observation"].shape == (5, 4)
    assert torch.equal(TensorDict.load_memmap(tmp_path)["observation"], OBSERVATION)


class Masked(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask=None):
        return self.layer(x) if mask is None else self.layer(x) * mask


def test_an_argument_that_the_model_can_do_without(layer):
    model = TensorDictModule(Masked(layer), ["observation", "mask"], ["q"])
    assert set(same_without(model, batch)["attr"].keys()) == {"observation"}
    assert set(explain(model, batch(mask=torch.ones(5, 1)))["attr"].keys()) == {"observation", "mask"}


def test_entries_that_the_model_cannot_do_without():
    model = TensorDictModule(nn.Bilinear(4, 4, 2), ["observation", "other"], ["q"])
    with pytest.raises(KeyError, match="key 'other' is missing from the TensorDict, which has observation"):
        explain(model, batch())
    with pytest.raises(
        KeyError, match="keys 'observation', 'other' are missing from the TensorDict, which has nothing"
    ):
        explain(model, TensorDict({}, [5]))


class AllThereIs(TensorDictModuleBase):
    """Reads whatever it is given."""

    in_keys, out_keys = ["observation"], ["q"]

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, td):
        return td.set("q", self.layer(torch.cat(list(td.values()), -1)).tanh())


@pytest.mark.parametrize(
    "method",
    [LRP("epsilon", baseline=0.0), IntegratedGradients(), Ablation()],
    ids=["LRP", "path", "perturbed"],
)
def test_a_model_that_reads_all_there_is_is_given_nothing_more(layer, method):
    method = method.explaining(Target("q", "argmax"))
    found = method.wrap(AllThereIs(layer))(batch())
    expected = method.wrap(q_of(nn.Sequential(layer, nn.Tanh())))(batch())
    assert torch.equal(found["attr", "observation"], expected["attr", "observation"])


def test_functions_in_a_sequence_say_what_they_read(layer):
    def function(td):
        return td.set("h", td["observation"] * 2)

    told = WrapModule(function, in_keys=["observation"], out_keys=["h"])
    model = TensorDictSequential(told, TensorDictModule(layer, ["h"], ["q"]))
    assert same_without(model, batch)["attr", "observation"].shape == (5, 4)
    untold = TensorDictSequential(function, TensorDictModule(layer, ["h"], ["q"]))
    text = "the function at 'module.0' of the model does not say what it reads and writes: make it WrapModule"
    with pytest.raises(KeyError, match=text):
        explain(untold, batch())
    with pytest.raises(ValueError, match=text):
        LRP("epsilon", target="q").wrap(untold, in_keys=["observation"])


def test_a_sequence_of_which_parts_may_be_left_out(layer):
    sequence = TensorDictSequential(
        TensorDictModule(layer, ["goal"], ["p"]), q_of(layer), partial_tolerant=True
    )
    written = same_without(sequence, batch)
    assert set(written["attr"].keys()) == {"observation"} and "p" not in written


class Both(nn.Module):
    def forward(self, params):
        return params["a"] + params["b"]


@pytest.mark.parametrize("stale", [False, True])
def test_an_entry_of_which_the_model_writes_a_part(layer, stale):
    """What is written is no input, even where it is there from an earlier call; what is given is one."""
    sequence = TensorDictSequential(
        TensorDictModule(layer, ["observation"], [("params", "a")]),
        TensorDictModule(Both(), ["params"], ["q"]),
    )
    params = {"b": torch.ones(5, 3), **({"a": torch.full((5, 3), 9.0)} if stale else {})}
    explained = LRP("epsilon", target="q", ledger=True).wrap(sequence)
    assert explained.in_keys == ["observation"]
    written = explained(batch(params=params))
    assert set(written["attr"].keys(True, True)) == {"observation", ("params", "b")}
    assert written["ledger", "gap"].abs().max() < 1e-5
    assert isinstance(written["params"], TensorDictBase)


class Moves(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, state):
        return self.layer(state["h"])


def test_a_state_that_is_read_before_it_is_written_is_an_input():
    sequence = TensorDictSequential(
        TensorDictModule(Moves(), ["state"], [("state", "h")]),
        TensorDictModule(nn.Linear(3, 2), [("state", "h")], ["q"]),
    )
    td = explain(sequence, TensorDict({"state": {"h": torch.ones(5, 3)}}, [5]))
    assert td["attr", "state", "h"].abs().sum() > 0
