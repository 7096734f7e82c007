"""State under compilation: a graph hands back what the model holds anew; what is no tensor makes no graph."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import Attribution, IntegratedGradients

BATCHES = (3, 3, 3, 4, 4, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head, self.norm = nn.GRUCell(5, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.h, self.count, self.past = None, 0, []
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("late", None)
        self.generator = torch.Generator().manual_seed(1)
        self.double()


class Hidden(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(x, None if self.h is None else self.h[:1].expand(len(x), -1))
        return self.head(self.h)


class Buffers(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        self.mean = 0.9 * self.mean + h.mean(0)
        self.calls += 1
        return self.head(self.norm(h) + self.mean * self.calls)


class LateBuffer(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        self.late = h.mean(0) if self.late is None else self.late + 1
        return self.head(h + self.late)


class Registered(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        self.register_buffer("new", h.mean(0))
        return self.head(h + self.new)


class Number(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.head(self.cell(x) * self.count)


class List(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.past.append(x.mean())
        return self.head(self.cell(x)) * sum(self.past)


class Noise(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)) * float(np.random.rand()) * random.random()


class Generator(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)) * torch.rand(1, generator=self.generator)


@pytest.mark.parametrize(
    "make, graph",
    [
        (Hidden, True),
        (Buffers, True),
        (LateBuffer, True),
        (Registered, True),
        (Number, False),
        (List, False),
        (Noise, False),
        (Generator, False),
    ],
)
def test_each_call_is_the_plain_one(make: Callable[[], Net], graph: bool) -> None:
    model, plain = make(), make()
    method = LRP("lstm_lrp", target=Target("output", 0), compile={"backend": "aot_eager"})
    explained, eager = method.wrap(model), LRP("lstm_lrp", target=Target("output", 0)).wrap(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, size in enumerate(BATCHES):
            td = TensorDict({"input": torch.randn(size, 5).double()}, [size])
            found = []
            for module in (eager, explained):
                np.random.seed(i)
                random.seed(i)
                found.append(module(td.clone()))
            for key in ("output", ("attr", "input")):
                torch.testing.assert_close(found[1][key], found[0][key])
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert type(ours) is type(theirs) and not ours.requires_grad
    assert (model.count, len(model.past)) == (plain.count, len(plain.past))
    said = [str(warning.message) for warning in caught if "one graph" in str(warning.message)]
    assert len(said) == (0 if graph else 1)
    if not graph:
        expected = (
            f"({make.__name__} changes what it holds besides tensors, or draws random numbers of its own)"
        )
        assert f"Remembers: {expected[1:-1]}" in said[0]


def test_a_state_that_is_forgotten_is_begun_again() -> None:
    model, plain = Hidden(), Hidden()
    explained = LRP("lstm_lrp", target=Target("output", 0), compile={"backend": "aot_eager"}).wrap(model)
    for i in range(6):
        if i == 3:
            model.h = plain.h = None
        x = torch.randn(3, 5).double()
        torch.testing.assert_close(explained(TensorDict({"input": x}, [3]))["output"], plain(x))


class Training(Net):
    """Changes what it holds in training alone."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        del self.generator  # whose state no graph can look at between two runs

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.counts:
            self.count += 1
        return self.head(self.norm(self.cell(x)).tanh()) * (1 + self.count)


METHODS: dict[str, Callable[..., Attribution]] = {
    "lrp": lambda **options: LRP("epsilon", target=Target("output", 0), **options),
    "lrp against a baseline": lambda **options: LRP(
        "cp_lrp", target=Target("output", 0), baseline=0.3, **options
    ),
    "integrated gradients": lambda **options: IntegratedGradients(
        target=Target("output", 0), steps=2, **options
    ),
}


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_what_a_model_does_in_another_mode_is_seen_when_it_comes(name: str, counts: bool) -> None:
    """The first call is in evaluation, where nothing that the model holds changes."""
    model, plain = Training(counts), Training(counts)
    explained = METHODS[name](compile={"backend": "aot_eager"}).wrap(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for training in (False, True, False):
            x = torch.randn(3, 5).double()
            output = plain.train(training)(x)
            model.train(training)
            torch.testing.assert_close(explained(TensorDict({"input": x}, [3]))["output"], output)
            assert model.count == plain.count
            for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs)
    assert any("one graph" in str(warning.message) for warning in caught) == counts
