"""State that a model keeps: what a plain call leaves, off every graph, and constant in the next call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdhook import LRP, References, Target
from tdhook.attribution import (
    Ablation,
    Averaged,
    Gradient,
    GradientTimesInput,
    IntegratedGradients,
    Noise,
    Product,
)
from tdhook.rules import EpsilonRule, GammaRule, WSquareRule

OUTSIDE: list[Tensor] = []
FIRST = Target("output", 0)
METHODS = {
    "LRP": lambda: LRP("epsilon_plus", target=FIRST, on_unmatched="ignore"),
    "traced": lambda: LRP("epsilon_plus_flat", target=FIRST, on_unmatched="ignore"),
    "ledger": lambda: LRP("lstm_lrp", target=FIRST, ledger=True, on_unmatched="ignore"),
    "gradient": lambda: GradientTimesInput(target=FIRST),
    "integrated": lambda: IntegratedGradients(target=FIRST, steps=3),
    "perturbed": lambda: Ablation(target=FIRST),
    "averaged": lambda: Averaged(GradientTimesInput(target=FIRST), Noise(0.1, samples=3)),
    "averaged over references": lambda: Averaged(
        IntegratedGradients(target=FIRST, steps=2), References("sample", 2)
    ),
    "product": lambda: Product(GradientTimesInput(target=FIRST), Gradient(target=FIRST)),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Remembering(nn.Module):
    """Keeps something of each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.relu, self.fc = nn.GRUCell(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)
        self.kept: Any = None
        self.past: list[Tensor] = []
        self.register_buffer("mean", torch.zeros(4))
        self.double()


class Hidden(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.cell(x, self.kept)
        return self.fc(self.kept)


class Views(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, None if self.kept is None else torch.cat(self.kept, -1))
        self.kept = h.chunk(2, -1)
        return self.fc(h)


class Inputs(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        self.past.append(x)
        return self.fc(self.cell(torch.stack(self.past).mean(0)))


class Assigned(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        self.mean = 0.9 * self.mean + h.mean(0)
        return self.fc(h + self.mean)


class Updated(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        self.mean.mul_(0.9).add_(h.mean(0))
        return self.fc(h + self.mean)


class Elsewhere(Remembering):
    """Neither on the module nor in anything that it leads to."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        OUTSIDE.append(h)
        return self.fc(h)


class BeforeReLU(Remembering):
    """What an in-place layer overwrites is kept."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.cell(x)
        return self.fc(self.relu(self.kept))


MODELS = [Hidden, Views, Inputs, Assigned, Updated, Elsewhere, BeforeReLU]


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for one in value for x in tensors_in(one)] if isinstance(value, list | tuple) else []


def inputs(*sizes: int) -> list[Tensor]:
    return [
        torch.randn(n, 5, generator=torch.Generator().manual_seed(i)).double() for i, n in enumerate(sizes)
    ]


@every_method
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("make", MODELS)
def test_what_is_kept_is_that_of_a_plain_call_off_the_graph(
    make: Callable[[], Remembering], grad: Callable[[], Any], method: Callable[[], Any]
) -> None:
    model, plain = make(), make()
    explained = method().wrap(model)
    for x in inputs(3, 3, 3, 3):
        with torch.no_grad():
            expected = plain(x)
        theirs = tensors_in([plain.kept, plain.past, plain.mean, OUTSIDE])
        theirs = [value.clone() for value in theirs]
        OUTSIDE.clear()
        with grad():
            td = explained(TensorDict({"input": x}, [len(x)]))
        ours = tensors_in([model.kept, model.past, model.mean, OUTSIDE])
        torch.testing.assert_close(td["output"], expected)
        assert all(value.grad_fn is None and not value.requires_grad for value in ours)
        if make is not Elsewhere:
            assert all(map(torch.equal, ours, theirs))
        OUTSIDE.clear()
        if ("ledger", "gap") in td.keys(True):
            assert td["ledger", "gap"].abs().max() < 1e-12


@every_method
def test_nothing_is_left_on_the_graph_where_a_call_fails(method: Callable[[], Any]) -> None:
    class Failing(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ArithmeticError("after the state")

    model = Failing()
    with pytest.raises(ArithmeticError):
        method().wrap(model)(TensorDict({"input": inputs(3)[0]}, [3]))
    assert not any(value.requires_grad for value in tensors_in(model.kept))


class Late(nn.Module):
    """Overwrites, and remembers, in batches of more than two alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(5, 2), nn.BatchNorm1d(5)
        self.register_buffer("calls", torch.zeros(()))
        self.past: list[float] = []
        self.count = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            self.calls += 1
            self.count += 1
            self.past.append(torch.rand(1).item())
            x = self.norm(x).clone()
            x[:, 0] *= 2
        return self.linear(x) + self.calls + self.count + sum(self.past)


@every_method
def test_a_later_call_that_is_made_again_counts_once(method: Callable[[], Any]) -> None:
    model, plain = Late().eval(), Late().eval()
    explained = method().wrap(model)
    for i, x in enumerate(inputs(2, 2, 3, 3)):
        if i == 2:
            model.train(), plain.train()
        torch.manual_seed(i)
        expected = plain(x)
        torch.manual_seed(i)
        assert torch.equal(explained(TensorDict({"input": x}, [len(x)]))["output"], expected)
    assert all(map(torch.equal, model.buffers(), plain.buffers()))
    assert (model.past, model.count) == (plain.past, plain.count)


class Counting(nn.Module):
    """Counts its calls in all ways, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(4, 4), nn.Dropout(0.3), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.generator, self.past = torch.Generator().manual_seed(3), []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.past.append(1.0)
        noise = torch.rand(1, generator=self.generator) + torch.rand(1)
        return self.norm(self.dropout(self.linear(x))) * (1 + self.calls) + noise + sum(self.past)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = Counting(), reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def spectral(n: int) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(4, n))


INSIDE = {
    "counts": Counting,
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "spectral norm": lambda: spectral(4),
    "spectral norm of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 1)),
        nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 4, 1)),
        nn.Flatten(),
    ),
    "random slope": nn.RReLU,
}
RULES = {
    "preset": "epsilon_plus",
    "gradient flow": "attn_lrp",
    "epsilon": [(Counting, EpsilonRule()), (nn.Linear, EpsilonRule())],
    "gamma": [(Counting, GammaRule(0.3)), (nn.Linear, GammaRule(0.3))],
    "w-square": [(Counting, WSquareRule()), (nn.Linear, WSquareRule())],
}


@pytest.mark.parametrize("ledger", [False, True], ids=["", "ledger"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("make", INSIDE.values(), ids=INSIDE)
def test_no_module_is_run_or_read_twice_where_it_could_tell(
    make: Callable[[], nn.Module], rules: Any, ledger: bool
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), make(), spectral(2)).train(), torch.randn(3, 5)
    generators = [m.generator for m in model.modules() if isinstance(m, Counting)]
    plain = copy.deepcopy(model)
    explained = LRP(rules, target=FIRST, ledger=ledger, on_unmatched="ignore").wrap(model)
    torch.manual_seed(1)
    expected = [plain(x) for _ in range(3)]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    found = [explained(TensorDict({"input": x}, [3]))["output"] for _ in range(3)]
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, model.buffers(), plain.buffers()))
    assert torch.equal(torch.get_rng_state(), state)
    theirs = [m.generator for m in plain.modules() if isinstance(m, Counting)]
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, theirs, strict=True))


class Returns(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(self.cell(x))
        self.relu(h)
        return h


class Viewed(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        self.relu(h.view(-1))
        return self.fc(h)


class SeenBefore(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        first = h[:, :2]
        y = self.relu(h)
        return self.fc(y) + first


@every_method
@pytest.mark.parametrize("make", [Returns, Viewed, SeenBefore])
def test_what_an_in_place_layer_overwrites_is_overwritten_for_whoever_sees_it(
    make: Callable[[], nn.Module], method: Callable[[], Any]
) -> None:
    model, plain = make(), make()
    explained = method().wrap(model)
    for x in inputs(3, 3):
        with torch.no_grad():
            assert torch.equal(explained(TensorDict({"input": x}, [3]))["output"], plain(x))


class Carrying(TensorDictModuleBase):
    """Has its state in the batch, and writes to it in place."""

    in_keys, out_keys = ["input", "steps", ("inner", "state")], ["output"]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(5, 2)

    def forward(self, td: TensorDict) -> TensorDict:
        steps, state = td["steps"], td["inner", "state"]
        steps += 1
        state.mul_(0.5).add_(steps)
        return td.set("output", self.fc(self.relu(td["input"] * state)) + steps)


@every_method
def test_state_that_a_batch_carries_is_written_to_once(method: Callable[[], Any]) -> None:
    explained, plain = method().wrap(Carrying(), in_keys=["input"]), Carrying()
    torch.manual_seed(1)
    given = {"input": torch.randn(3, 5), "steps": torch.zeros(3, 1), "inner": {"state": torch.ones(3, 1)}}
    td = TensorDict(given, [3])
    expected = td.clone()
    for _ in range(3):
        with torch.no_grad():
            plain(expected)
        steps, state = td["steps"], td["inner", "state"]
        explained(td)
        for key in ("output", "steps", ("inner", "state")):
            assert torch.equal(td[key], expected[key])
        assert td["steps"] is steps and td["inner", "state"] is state


@every_method
def test_state_that_a_batch_carries_is_left_where_a_call_fails(method: Callable[[], Any]) -> None:
    class Failing(Carrying):
        def forward(self, td: TensorDict) -> TensorDict:
            super().forward(td)
            raise ArithmeticError("after the state")

    given = {"input": torch.randn(3, 5), "steps": torch.zeros(3, 1), "inner": {"state": torch.ones(3, 1)}}
    td = TensorDict(given, [3])
    with pytest.raises(ArithmeticError):
        method().wrap(Failing(), in_keys=["input"])(td)
    assert (td["steps"] == 0).all() and (td["inner", "state"] == 1).all()
