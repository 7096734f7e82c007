"""What is captured of a module stays what the module returned, whatever the model does to that afterwards."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import LRP, Target


class Summed(nn.Module):
    """Adds two layers, and scales the sum, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        if self.in_place:
            h += self.second(x)
            h[:, 0] = 0.0
        else:
            h = h + self.second(x)
            h = torch.cat([torch.zeros_like(h[:, :1]), h[:, 1:]], 1)
        y: Tensor = self.last(h)
        return y


def both() -> list[Summed]:
    models = [Summed(in_place).double() for in_place in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_relevance_and_values_of_a_module_whose_output_is_overwritten(flow: str) -> None:
    td = TensorDict({"input": torch.randn(3, 4, dtype=torch.float64)}, batch_size=[3])
    method = LRP(
        "epsilon_plus",
        target=Target("output", 0),
        flow=flow,
        ledger=True,
        input_modules=["first"],
        values=["first"],
    )
    explained = []
    for model in both():
        with method.prepare(model) as run:
            explained.append(run(td.clone()))
    for key in (("attr", "first"), ("value", "first"), ("attr", "input"), ("ledger", "gap")):
        torch.testing.assert_close(explained[1][key], explained[0][key])


class Tokens(nn.Module):
    """Adds positions to embedded tokens, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(7, 4), nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids)
        h += self.places(ids)
        y: Tensor = self.head(h)
        return y


def test_embedded_tokens_that_the_model_adds_to_get_the_relevance_of_what_they_were() -> None:
    model = Tokens().double()
    td = TensorDict({"ids": torch.arange(3)}, batch_size=[3])
    method = LRP(
        "epsilon_plus", target=Target("y", 1), ledger=True, use_inputs=False, input_modules=["module.tokens"]
    )
    with method.prepare(TensorDictModule(model, ["ids"], ["y"])) as run:
        done = run(td)
    assert (done["ledger", "gap"].abs() < 1e-9).all()
    tokens, weight = model.tokens.weight[:3], model.head.weight[1]
    torch.testing.assert_close(
        done["attr", "module.tokens"], (tokens * weight).detach(), rtol=1e-4, atol=1e-6
    )


def test_a_key_that_is_overwritten_after_it_was_written() -> None:
    class Add(nn.Module):
        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            h += x
            return h.sum(-1, keepdim=True)

    def model() -> TensorDictSequential:
        first = TensorDictModule(nn.Linear(4, 4, bias=False).double(), ["x"], ["h"])
        return TensorDictSequential(first, TensorDictModule(Add(), ["h", "x"], ["y"]))

    td = TensorDict({"x": torch.randn(3, 4, dtype=torch.float64)}, batch_size=[3])
    sequential = model()
    method = LRP("epsilon_plus", target=Target("y", 0), attribute=["x", "h"])
    with method.prepare(sequential) as run:
        done = run(td.clone())
    torch.testing.assert_close(
        done["attr", "h"], sequential[0].module(td["x"]).detach(), rtol=1e-4, atol=1e-6
    )
