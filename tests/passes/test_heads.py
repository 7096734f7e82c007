"""What comes behind the explained values stays off the tape, where that changes nothing."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import Gradient


class Seen(nn.Module):
    """Notes whether gradients are on."""

    def __init__(self, change=lambda x: x) -> None:
        super().__init__()
        self.change, self.on = change, []

    def forward(self, x: Tensor) -> Tensor:
        self.on.append(torch.is_grad_enabled())
        return self.change(x)


def policy(head: nn.Module, writes: str = "action") -> TensorDictSequential:
    torch.manual_seed(0)
    net = TensorDictModule(nn.Linear(3, 4), ["observation"], ["logits"])
    return TensorDictSequential(net, TensorDictModule(head, ["logits"], [writes]))


def observation() -> TensorDict:
    return TensorDict({"observation": torch.randn(5, 3)}, [5])


@pytest.mark.parametrize(
    "method", [LRP("epsilon", target=Target("logits", 0)), Gradient(Target("logits", 0))]
)
def test_a_head_is_off_the_tape_once_it_is_known(method) -> None:
    head = Seen(lambda x: x.argmax(-1))
    explained = method.wrap(policy(head))
    td = observation()
    first, second = explained(td.clone()), explained(td.clone())
    assert head.on == [True, False]
    torch.testing.assert_close(first["attr", "observation"], second["attr", "observation"], rtol=0, atol=0)
    torch.testing.assert_close(first["action"], second["action"])
    assert torch.is_grad_enabled()


def test_a_run_on_a_reference_has_its_heads_as_the_run_that_is_explained() -> None:
    """What are heads is known after the first run, and that on the reference must do what the first one did."""
    head = Seen(lambda x: (x.argmax(-1), x.max(-1).values)[0])
    explained = LRP("epsilon", target=Target("logits", 0), baseline=0.0).wrap(policy(head))
    td = observation()
    first, second = explained(td.clone()), explained(td.clone())
    torch.testing.assert_close(first["attr", "observation"], second["attr", "observation"])


def test_a_head_that_makes_the_explained_value_is_on_the_tape() -> None:
    head = Seen(lambda x: 2 * x)
    explained = LRP("epsilon", target=Target("logits", 0)).wrap(policy(head, "logits"))
    explained(observation())
    explained(observation())
    assert head.on == [True, True]


def test_a_head_that_begins_to_change_the_value_is_noticed() -> None:
    head = Seen()
    explained = Gradient(Target("logits", 0), signed=True).wrap(policy(head, "logits"))
    td = observation()
    explained(td.clone())
    explained(td.clone())
    head.change = lambda x: 3 * x
    tripled = explained(td.clone())["attr", "observation"]
    weight = explained.model.root[0].module.weight[0].detach()
    torch.testing.assert_close(tripled, 3 * weight.expand(5, 3))
    assert head.on == [True, False, True]  # what the run did that was made again is put back


def test_a_head_that_overwrites_the_value_in_place_is_on_the_tape() -> None:
    head = Seen(lambda x: x.mul_(2))
    explained = LRP("epsilon", target=Target("logits", 0), ledger=True).wrap(policy(head))
    for _ in range(3):
        found = explained(observation())
    torch.testing.assert_close(found["ledger", "gap"], torch.zeros(5), rtol=0, atol=1e-5)


def test_all_of_the_model_is_accounted_for() -> None:
    head = Seen(lambda x: x.argmax(-1))
    explained = LRP("epsilon", target=Target("logits", 0), ledger=True).wrap(policy(head))
    explained(observation())
    explained(observation())
    assert head.on == [True, True]


def test_the_gradient_of_a_value_that_a_head_overwrites() -> None:
    explained = Gradient(Target("logits", 0), signed=True).wrap(policy(Seen(lambda x: x.mul_(2))))
    weight = explained.model.root[0].module.weight[0].detach()
    for _ in range(3):
        found = explained(observation())["attr", "observation"]
        torch.testing.assert_close(found, 2 * weight.expand(5, 3))
