"""What is captured of a module stays what the module returned, whatever the model does to that afterwards."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import GradientTimesInput
from tdhook.rules import EpsilonRule


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


class Residual(nn.Module):
    """Two layers that read a stream and add to it; the second is given it by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        y: Tensor = x + self.second(input=x)
        return y


def test_what_a_module_was_given_has_relevance_of_its_own() -> None:
    """That which goes through the module, and not along it."""
    model = Residual().double()
    td = TensorDict({"input": torch.randn(3, 4, dtype=torch.float64)}, batch_size=[3])
    target = Target("output", 0)
    places = ["first:input", "second:input"]
    found = GradientTimesInput(target, input_modules=places, values=True).wrap(model)(td.clone())
    x, first, second = td["input"], model.first.weight, model.second.weight
    h = x + x @ first.T
    torch.testing.assert_close(found["value", "second:input"], h.detach())
    torch.testing.assert_close(found["attr", "second:input"], (h * second[0]).detach())
    torch.testing.assert_close(found["attr", "first:input"], (x * ((second[0] @ first) + first[0])).detach())
    lrp = LRP([(nn.Linear, EpsilonRule(0.0))], target=target, input_modules=places).wrap(model)(td.clone())
    for place in places:
        torch.testing.assert_close(lrp["attr", place], found["attr", place])


def test_a_module_that_was_given_no_numbers() -> None:
    method = LRP("epsilon", target=Target("output", 1), use_inputs=False, input_modules=["tokens:input"])
    with pytest.raises(TypeError, match=r"module 'tokens' \(Embedding\) was given no floating-point tensor"):
        method.wrap(Tokens())(TensorDict({"input": torch.arange(3)}, batch_size=[3]))


class Blocks(nn.Module):
    """Its block returns what those of transformers do: a tuple of what it made, and of what was not asked for."""

    class Block(nn.Module):
        def __init__(self, *others: object) -> None:
            super().__init__()
            self.layer, self.others = nn.Linear(4, 4), others

        def forward(self, x: Tensor) -> tuple[object, ...]:
            return (self.layer(x), *self.others)

    def __init__(self, *others: object) -> None:
        super().__init__()
        self.block, self.head = Blocks.Block(*others), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(x)[0])
        return y


def test_the_one_tensor_of_a_tuple_is_what_a_module_returned() -> None:
    td = TensorDict({"input": torch.randn(3, 4)}, batch_size=[3])
    for others in ((), (None,), (None, None)):
        method = LRP("epsilon", target=Target("output", 0), input_modules=["block", "block.layer"])
        found = method.wrap(Blocks(*others))(td.clone())
        torch.testing.assert_close(found["attr", "block"], found["attr", "block.layer"])
    for others in ((torch.zeros(3, 4),), ("kept",)):
        with pytest.raises(
            TypeError, match="returned tuple; only modules that return one tensor, alone or in a tuple"
        ):
            LRP("epsilon", target=Target("output", 0), input_modules=["block"]).wrap(Blocks(*others))(
                td.clone()
            )


def test_keys_may_be_named_among_modules() -> None:
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 5), ["x"], ["h"]), TensorDictModule(nn.Linear(5, 2), ["h"], ["y"])
    ).double()
    td = TensorDict({"x": torch.randn(3, 4, dtype=torch.float64)}, batch_size=[3])
    named = LRP("epsilon", target=Target("y", 0), input_modules=["h", "module.0.module"], use_inputs=False)
    named = named.wrap(model)(td.clone())
    assert set(named["attr"].keys()) == {"h", "module.0.module"}
    torch.testing.assert_close(named["attr", "h"], named["attr", "module.0.module"])
    with pytest.raises(ValueError, match="input_modules names 'h', a key: name it in attribute"):
        LRP("epsilon", target=Target("y", 0), input_modules=["h"], attribute="all").wrap(model)
    with pytest.raises(ValueError, match="the model has no module 'nothing'"):
        LRP("epsilon", target=Target("y", 0), input_modules=["h", "nothing"]).wrap(model)
