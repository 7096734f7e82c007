"""How differences are run: as the model runs, call after call, compiled, in threads, and what cannot be."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from differences import FLOWS, PRESETS, explained, mlp, td_of
from torch import Tensor, nn
from unchanged import Unchanged

from tdhook import LRP, Target
from tdhook.composites import preset
from tdhook.rules import (
    EpsilonRule,
    PropagationRule,
)

pytestmark = pytest.mark.usefixtures("doubles")


def test_outputs_are_those_of_the_model() -> None:
    model, x = mlp(), torch.randn(4, 6)
    assert torch.equal(explained(model, x, 0.0)["output"], model(x))


@pytest.mark.parametrize("flow", FLOWS)
def test_the_same_call_after_call(flow: str) -> None:
    """Kept references are those of the weights, and of the rows, at hand."""
    model, x = mlp(), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=torch.ones(6), flow=flow).prepare(model) as run:
        for step in range(6):
            td = run(td_of(x[: 4 - step % 2]))
            wanted = (model(x) - model(torch.ones(6))).detach()[: 4 - step % 2, 0]
            torch.testing.assert_close(td["attr", "input"].sum(1), wanted)
            with torch.no_grad():
                if step == 1:
                    model[0].weight.mul_(1.5)
                elif step == 2:
                    model[2].bias.data.add_(0.5)
                elif step == 3:
                    model[4].weight.data = model[4].weight.data * 0.5
                    model[2].bias.data[-1] += 2.0


@pytest.mark.parametrize("flow", FLOWS)
def test_rows_of_their_own_do_not_become_one(flow: str) -> None:
    """Nor do those of a linear model, whose calls are not looked at."""
    model, x, start = nn.Linear(6, 3), torch.randn(4, 6), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=start, flow=flow).prepare(model) as run:
        for _ in range(3):
            found = run(td_of(x))["attr", "input"]
            torch.testing.assert_close(found, model.weight[0].detach() * (x - start))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x - x.mean(0),
        lambda x: x + x.roll(1, 0),
        lambda x: x.softmax(0),
        lambda x: x * torch.arange(1.0, 1 + len(x)).unsqueeze(1),
        lambda x: x.sort(0)[0],
        lambda x: torch.maximum(x, x.flip(0)),
    ],
)
def test_rows_that_meet(mixing: Callable[[Tensor], Tensor], flow: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(mixing(self.first(x))))

    model, x = Model(), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=0.3, flow=flow).prepare(model) as run:
        for _ in range(3):
            found = run(td_of(x))["attr", "input"].sum()
            wanted = (model(x) - model(torch.full((4, 6), 0.3))).detach()[:, 0].sum()
            torch.testing.assert_close(found, wanted)


def test_compiled() -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    eager = explained(model, x, start)["attr", "input"]
    with LRP(
        "deeplift", target=Target("output", 0), baseline=start, compile={"backend": "aot_eager"}
    ).prepare(model) as run:
        found = run(td_of(x))["attr", "input"]
    torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-9)


def test_in_threads() -> None:
    results: dict[int, Tensor] = {}
    model, x = mlp(), torch.randn(8, 4, 6)

    def work(i: int) -> None:
        results[i] = explained(model, x[i], float(i))["attr", "input"].sum(1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        wanted = (model(x[i]) - model(torch.full((4, 6), float(i)))).detach()[:, 0]
        torch.testing.assert_close(results[i], wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_dropout_drops_the_same(flow: str) -> None:
    model, x, start = (
        nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3)),
        torch.randn(4, 6),
        0.2,
    )
    torch.manual_seed(3)
    value = model(x)
    after = torch.rand(1)
    torch.manual_seed(3)
    there = model(torch.full((4, 6), start))
    torch.manual_seed(3)
    found = explained(model, x, start, flow=flow)
    assert torch.equal(found["output"], value) and torch.equal(after, torch.rand(1))
    torch.testing.assert_close(found["attr", "input"].sum(1), (value - there).detach()[:, 0])


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x * factor for factor in (0.5, -1.0, 1.5))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4).sum(-2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(3, 3, num_layers=3, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0][:, -1]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("make", [Attends, Recurrent])
def test_what_is_written_out_drops_the_same(make: Callable[[], nn.Module], flow: str) -> None:
    model, x, start = make(), torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    torch.manual_seed(3)
    value = model(x)
    torch.manual_seed(3)
    there = model(start)
    torch.manual_seed(3)
    found = explained(model, x, start, flow=flow, ledger=True)
    torch.testing.assert_close(found["attr", "input"].sum((1, 2)), (value - there).detach()[:, 0])


@pytest.mark.parametrize("flow", FLOWS)
def test_batch_norm_in_training(flow: str) -> None:
    """Rows meet: what arrives is right of the batch. Its statistics follow the input once, and the reference never."""
    model, x, start = (
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(4, 6),
        torch.randn(4, 6),
    )
    plain = nn.BatchNorm1d(8)
    plain(model[0](x))
    found = explained(model, x, start, flow=flow)
    torch.testing.assert_close(model[1].running_mean, plain.running_mean)
    assert model[1].num_batches_tracked == 1
    wanted = (model(x) - model(start)).detach()[:, 0].sum()
    torch.testing.assert_close(found["attr", "input"].sum(), wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_checkpointed_parts(flow: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = mlp(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))

    model, x = Model(), torch.randn(4, 6)
    found = explained(model, x, 0.1, flow=flow)["attr", "input"].sum(1)
    torch.testing.assert_close(found, (model(x) - model(torch.full((4, 6), 0.1))).detach()[:, 0])


@pytest.mark.parametrize("flow", FLOWS)
def test_overwritten_values(flow: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h.relu_().mul_(1.5).add_(x)
            h[:, 1:3] = h[:, 3:5] * x[:, :2]
            h[:, 0] *= 2
            return self.last(h)

    model, x, start = Model(), torch.randn(4, 6), torch.randn(4, 6)
    for _ in range(2):
        found = explained(model, x, start, flow=flow)["attr", "input"].sum(1)
        torch.testing.assert_close(found, (model(x) - model(start)).detach()[:, 0])


def test_nothing_is_left_behind() -> None:
    model, x = mlp(), torch.randn(4, 6, requires_grad=True)
    unchanged = Unchanged(model)
    with LRP("deeplift", target=Target("output", 0), baseline=0.0).prepare(model) as run:
        td = run(td_of(x))
        td = run(td_of(x))
    unchanged.check()
    assert x.grad is None and td["attr", "input"].grad_fn is None and td["output"].grad_fn is None
    kept = weakref.ref(run)
    del run, td
    gc.collect()
    assert kept() is None


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fails = nn.Linear(6, 3), lambda x: False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inner(x))
        if self.fails(x.detach()):
            raise KeyboardInterrupt
        return h


@pytest.mark.parametrize("reference", [False, True])
def test_an_interrupt_leaves_the_model_whole(reference: bool) -> None:
    model, x = Fails(), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=torch.zeros_like).prepare(model) as run:
        run(td_of(x))
        model.fails = lambda x: bool((x == 0).all()) == reference
        unchanged = Unchanged(model)
        with pytest.raises(KeyboardInterrupt):
            run(td_of(x))
        unchanged.check()
        model.fails = lambda x: False
        found = run(td_of(x))["attr", "input"].sum(1)
        torch.testing.assert_close(found, (model(x) - model(torch.zeros(4, 6))).detach()[:, 0])


class Own(PropagationRule):
    def propagate(self, step, relevance):
        return tuple(relevance[0] for _ in step.inputs)


def test_a_rule_of_ones_own_sees_differences() -> None:
    model, x, start = nn.Sequential(nn.Tanh(), nn.Linear(6, 3)), torch.randn(4, 6), torch.randn(4, 6)
    found = explained(model, x, start, [(nn.Tanh, Own()), (nn.Linear, EpsilonRule(0.0))])
    torch.testing.assert_close(found["attr", "input"].sum(1), (model(x) - model(start)).detach()[:, 0])


def test_a_rule_mapper_has_no_differences() -> None:
    with pytest.raises(ValueError, match="needs a composite"):
        LRP(rule_mapper=lambda name, module: EpsilonRule(), baseline=0.0)


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet"])
def test_modified_gradients_have_no_differences(name: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=r"baseline|reference|difference"):
        explained(mlp(), torch.randn(4, 6), 0.0, name)


def test_baselines_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="baseline of 'input' has shape"):
        explained(mlp(), torch.randn(4, 6), torch.zeros(5))
    with pytest.raises(KeyError, match="'nothing'"):
        explained(mlp(), torch.randn(4, 6), {"nothing": 0.0})
    with pytest.raises(KeyError, match="'unheard_of'"):
        explained(mlp(), torch.randn(4, 6), "unheard_of")
    with pytest.raises(ValueError, match="sample"):
        LRP("deeplift", baseline=0.0, samples=3)
    with pytest.raises(ValueError, match="give baseline too"):
        LRP("deeplift", samples=3)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).tanh() if float(x.sum()) > 0 else self.second(x).relu()


@pytest.mark.parametrize("flow", FLOWS)
def test_another_way_on_the_reference_is_told(flow: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="something else on the reference"):
            explained(Branches(), torch.ones(4, 6), -1.0, flow=flow)


def test_presets_are_all_here() -> None:
    from tdhook.composites import PRESETS as all_presets

    others = {"guided_backprop", "deconvnet", "beta_smooth", "epsilon_gamma_box", "relp"}
    assert set(all_presets) - others <= {*PRESETS}, set(all_presets) - others - {*PRESETS}
    assert all(preset(name) for name in PRESETS)
