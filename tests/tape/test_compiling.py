"""Functions that torch.compile made, inside a model, are refused by name, or run as the Python they were written in."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tdhook import LRP, Target
from tdhook.attribution import IntegratedGradients
from tdhook.tape.internals import told_when_compiling


def gated(x, weight):
    hidden = nn.functional.linear(x, weight)
    return hidden * torch.sigmoid(hidden)


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.first, self.last = function, nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.function(x, self.first.weight))


METHODS = {
    "plain": LRP("epsilon", target=Target("output", 0)),
    "ledger": LRP("epsilon_plus", target=Target("output", 0), ledger=True),
    "baseline": LRP("deeplift", target=Target("output", 0), baseline=0.0),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def observation() -> TensorDict:
    return TensorDict({"input": torch.rand(3, 4)}, [3])


@pytest.mark.parametrize("name", METHODS)
def test_refused_by_name_and_nothing_is_left_behind(name):
    backend = CompileCounterWithBackend("eager")
    model, td = Net(torch.compile(gated, backend=backend)), observation()
    explained = METHODS[name].wrap(model)
    for _ in range(2):
        with pytest.raises(
            Exception, match=r"the model calls `gated`, which torch.compile made.*force_eager"
        ):
            explained(td.clone())
    assert backend.frame_count == 0
    torch.testing.assert_close(model(td["input"]), Net(gated)(td["input"]))
    assert backend.frame_count == 1
    with pytest.raises(Exception, match="the model calls `gated`"):  # it is not what it was compiled as
        explained(td.clone())


@pytest.mark.parametrize("name", METHODS)
def test_as_python_it_is_explained_as_what_it_was_made_of(name):
    td = observation()
    expected = METHODS[name].wrap(Net(gated))(td.clone())["attr", "input"]
    explained = METHODS[name].wrap(Net(torch.compile(gated, backend="eager")))
    with torch.compiler.set_stance("force_eager"):
        found = explained(td.clone())["attr", "input"]
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_methods_without_rules_run_it_compiled():
    backend = CompileCounterWithBackend("eager")
    method, td = IntegratedGradients(Target("output", 0), steps=4), observation()
    found, expected = (
        method.wrap(Net(function))(td.clone())["attr", "input"]
        for function in (torch.compile(gated, backend=backend), gated)
    )
    torch.testing.assert_close(found, expected)


def test_what_is_told_before_something_is_compiled():
    names: list[str] = []

    def note(name: str) -> None:
        names.append(name)

    for _ in range(2):  # once is enough
        told_when_compiling(note)
    torch.compile(gated, backend="eager")(torch.ones(1, 4), torch.ones(2, 4))
    assert names == ["gated"]
