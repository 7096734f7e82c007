"""In hindsight, what a batch says was done is explained, and not what the model would do now."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Target
from tdhook.targets import LogProb
from tdhook.targets.hindsight import InHindsight
from tdhook.targets.pinned import Pinned, pin


def body() -> TensorDictModule:
    torch.manual_seed(0)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 4)

        def forward(self, x):
            loc, scale = self.net(x).chunk(2, -1)
            return loc, scale.exp()

    return TensorDictModule(Head(), ["observation"], ["loc", "scale"])


def acting() -> TensorDictSequential:
    """Takes the mean as its action, over what stands there."""
    return TensorDictSequential(body(), TensorDictModule(lambda loc: loc.clone(), ["loc"], ["action"]))


def batch() -> TensorDict:
    return TensorDict({"observation": torch.randn(5, 3), "action": torch.randn(5, 2)}, [5])


def test_a_target_that_computes_with_the_action_computes_with_the_stored_one() -> None:
    td, target = batch(), LogProb(["loc", "scale"], action="action")
    stored = LRP("epsilon", target=InHindsight(target, "mask")).wrap(acting())(td.clone())
    expected = LRP("epsilon", target=target).wrap(body())(td.clone())
    torch.testing.assert_close(stored["attr", "observation"], expected["attr", "observation"])
    now = LRP("epsilon", target=target).wrap(acting())(td.clone())
    assert not torch.allclose(stored["attr", "observation"], now["attr", "observation"])


def test_what_is_masked_is_not_explained() -> None:
    td = batch().set("mask", torch.tensor([True, False, True, False, True]))
    found = LRP("epsilon", target=InHindsight(Target("loc", 0), "mask")).wrap(body())(td.clone())
    whole = LRP("epsilon", target=Target("loc", 0)).wrap(body())(td.clone())
    relevance, mask = found["attr", "observation"], td["mask"]
    assert not relevance[~mask].any()
    torch.testing.assert_close(relevance[mask], whole["attr", "observation"][mask])


def test_a_pinned_target_explains_what_it_chose() -> None:
    td = batch()
    outputs = body()(td.clone()).select("loc", "scale")
    target, chosen = pin(Target("loc", "argmax"), outputs, td)
    assert isinstance(target, Pinned) and target.keys == ("loc",)
    seeds = target(-outputs, td.clone().update(TensorDict(chosen, [5])), "gradient")
    torch.testing.assert_close(seeds.grads[0].argmax(-1), outputs["loc"].argmax(-1))


def test_several_choices_are_pinned() -> None:
    td = batch()
    outputs = body()(td.clone()).select("loc", "scale")
    target, chosen = pin(Target("loc", "all"), outputs, td)
    seeds = target(outputs, td.clone().update(TensorDict(chosen, [5])), "relevance")
    expected = Target("loc", "all")(outputs, td, "relevance")
    assert seeds.several == expected.several == 2
    torch.testing.assert_close(seeds.grads[0], expected.grads[0])
