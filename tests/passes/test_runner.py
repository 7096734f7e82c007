"""What a method runs a model with."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import nn

from tdhook.models.model import Model
from tdhook.passes.runner import Runner
from tdhook.passes.setup import Question, Setup
from tdhook.targets import Entropy, Target


def test_values_are_those_of_the_model_and_of_the_target_off_the_tape() -> None:
    net, td = nn.Linear(3, 4), TensorDict({"input": torch.randn(5, 3)}, [5])
    runner = Runner(Setup(Model.of(net), Question(Entropy("output"))), td)
    found = runner.values(td)
    torch.testing.assert_close(found["output"], net(td["input"]).detach())
    expected = torch.distributions.Categorical(logits=net(td["input"])).entropy().detach()
    torch.testing.assert_close(found["entropy"], expected)
    assert not found["entropy"].requires_grad and list(td.keys()) == ["input"]


def test_the_first_run_on_the_inputs_as_they_are_is_what_is_written() -> None:
    net, td = nn.Linear(3, 4), TensorDict({"input": torch.randn(5, 3)}, [5])
    runner = Runner(Setup(Model.of(net), Question(Target("output", 0))), td)
    with torch.enable_grad():
        with runner.forward(td, replaced={"input": torch.zeros(5, 3)}) as moved:
            pass
        assert runner.base is None
        torch.testing.assert_close(moved.outputs["output"], net.bias.expand(5, 4))
        with runner.forward(td) as first, runner.forward(td):
            pass
    assert runner.base is first
