"""What may be compared, and what of it explained: baselines of any form, keys, outputs and targets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from differences import FLOWS, explained, mlp, td_of
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

import tdhook
from tdhook import LRP, Target
from tdhook.targets import Computed, Contrast, Entropy, LogProb

pytestmark = pytest.mark.usefixtures("doubles")


def test_a_number_a_row_rows_and_a_function_say_the_same() -> None:
    model, x = mlp(), torch.randn(4, 6)
    wanted = explained(model, x, torch.zeros(4, 6))["attr", "input"]
    for baseline in (0.0, 0, torch.zeros(6), torch.zeros(1, 6), torch.zeros_like, {"input": 0.0}):
        torch.testing.assert_close(
            explained(model, x, baseline)["attr", "input"], wanted, rtol=1e-12, atol=1e-12
        )


def test_a_baseline_that_follows_the_input() -> None:
    model, x = mlp(), torch.randn(4, 6)
    found = explained(model, x, lambda rows: 0.5 * rows)["attr", "input"].sum(1)
    torch.testing.assert_close(found, (model(x) - model(x / 2)).detach()[:, 0])


def test_rows_of_several_axes() -> None:
    model, x, start = mlp(), torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    for baseline in (start, start.reshape(6, 6), lambda rows: start.reshape(6, 6)):
        with LRP("deeplift", target=Target("output", 0), baseline=baseline).prepare(model) as run:
            found = run(td_of(x, 2))["attr", "input"].sum(-1)
        torch.testing.assert_close(found, (model(x) - model(start)).detach()[..., 0])


def test_the_mean_of_the_batch_and_of_data() -> None:
    model, x, data = mlp(), torch.randn(4, 6), torch.randn(50, 6)
    found = explained(model, x, "mean")["attr", "input"].sum(1)
    torch.testing.assert_close(found, (model(x) - model(x.mean(0))).detach()[:, 0])
    references = tdhook.References("mean", data=td_of(data)) if hasattr(tdhook, "References") else None
    if references is not None:
        found = explained(model, x, references)["attr", "input"].sum(1)
        torch.testing.assert_close(found, (model(x) - model(data.mean(0))).detach()[:, 0])


def test_several_are_averaged() -> None:
    model, x, data = mlp(), torch.randn(1, 6), torch.randn(5, 6)
    many = explained(model, x, td_of(data), samples=400)["attr", "input"]
    each = torch.stack([explained(model, x, row)["attr", "input"] for row in data]).mean(0)
    assert (many - each).abs().max() < 0.1 * each.abs().max()
    again = explained(model, x, td_of(data), samples=400)["attr", "input"]
    assert torch.equal(many, again)


def test_an_entry_of_the_tensordict() -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    td = TensorDict({"input": x, "before": start, "baseline": {"input": start}}, [4])
    for name in ("before", "baseline"):
        with LRP("deeplift", target=Target("output", 0), baseline=name).prepare(model) as run:
            found = run(td.copy())["attr", "input"].sum(1)
        torch.testing.assert_close(found, (model(x) - model(start)).detach()[:, 0])


def test_the_step_before() -> None:
    model, x = mlp(), torch.randn(2, 5, 6)
    done = torch.zeros(2, 5, 1, dtype=torch.bool)
    done[0, 2] = True
    td = TensorDict({"input": x, ("next", "done"): done}, [2, 5])
    with LRP("deeplift", target=Target("output", 0), baseline="previous").prepare(model) as run:
        found = run(td)["attr", "input"].sum(-1)
    value = model(x).detach()[..., 0]
    rise = torch.cat([torch.zeros(2, 1), value[:, 1:] - value[:, :-1]], 1)
    rise[0, 3] = 0
    torch.testing.assert_close(found, rise)


def keyed() -> TensorDictSequential:
    """Two keys, one of them nested, and a head that reads what they were made into."""
    return TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), [("robot", "arm")], ["left"]),
        TensorDictModule(nn.Linear(2, 4), ["eye"], ["right"]),
        TensorDictModule(lambda a, b: torch.tanh(a) * torch.sigmoid(b), ["left", "right"], ["hidden"]),
        TensorDictModule(nn.Linear(4, 3), ["hidden"], ["output"]),
    )


def keyed_td() -> TensorDict:
    return TensorDict({"robot": {"arm": torch.randn(5, 3)}, "eye": torch.randn(5, 2)}, [5])


@pytest.mark.parametrize("flow", FLOWS)
def test_nested_and_several_keys(flow: str) -> None:
    model, td, there = keyed(), keyed_td(), keyed_td()
    baseline = {("robot", "arm"): there["robot", "arm"], "eye": there["eye"]}
    with LRP("deeplift", target=Target("output", 1), baseline=baseline, flow=flow).prepare(model) as run:
        found = run(td.copy())
    total = found["attr", "robot", "arm"].sum(1) + found["attr", "eye"].sum(1)
    torch.testing.assert_close(total, (model(td.copy())["output"] - model(there)["output"]).detach()[:, 1])


@pytest.mark.parametrize("flow", FLOWS)
def test_keys_without_a_baseline_are_held_fixed(flow: str) -> None:
    model, td = keyed(), keyed_td()
    there = td.copy().set("eye", torch.zeros(5, 2))
    with LRP("deeplift", target=Target("output", 1), baseline={"eye": 0.0}, flow=flow).prepare(model) as run:
        found = run(td.copy())
    assert (found["attr", "robot", "arm"] == 0).all()
    wanted = (model(td.copy())["output"] - model(there)["output"]).detach()[:, 1]
    torch.testing.assert_close(found["attr", "eye"].sum(1), wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_all_outputs(flow: str) -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    td = explained(model, x, start, target=Target("output", "all"), flow=flow, ledger=True)
    wanted = (model(x) - model(start)).detach()
    torch.testing.assert_close(td["attr", "input"].sum(-1), wanted)
    assert td["ledger", "gap"].shape == wanted.shape and td["ledger", "gap"].abs().max() < 1e-12


TARGETS: dict[str, tuple[object, Callable[[Tensor, Tensor], Tensor]]] = {
    "contrast": (Contrast(Target("output", 0), Target("output", 2)), lambda z, at: z[:, 0] - z[:, 2]),
    "function": (
        Computed(lambda outputs, inputs: outputs["output"].logsumexp(-1)),
        lambda z, at: z.logsumexp(-1),
    ),
    "chosen by the input": (
        Target("output", "argmax"),
        lambda z, at: z.gather(1, at.argmax(1, True)).squeeze(1),
    ),
    "sum": (Target("output", [0, 1]), lambda z, at: z[:, 0] + z[:, 1]),
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str, flow: str) -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    target, value = TARGETS[name]
    found = explained(model, x, start, target=target, flow=flow, ledger=True)
    z, z0 = model(x).detach(), model(start).detach()
    wanted = value(z, z) - value(z0, z)
    relevance = found["attr", "input"]
    relevance = relevance.sum(-1) if relevance.dim() == 2 else relevance.sum((-1, -2))
    torch.testing.assert_close(relevance, wanted)
    assert found["ledger", "gap"].abs().max() < 1e-12


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("target", [Entropy(), LogProb()])
def test_targets_of_a_policy(target: object, flow: str) -> None:
    modules = pytest.importorskip("torchrl.modules")
    model = modules.ProbabilisticActor(
        TensorDictModule(mlp(), ["input"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    x, start = torch.randn(4, 6), torch.randn(4, 6)
    with LRP("deeplift", target=target, baseline=start, flow=flow, ledger=True).prepare(model) as run:
        found = run(td_of(x))
    log, log0 = ((model[0](td_of(value))["logits"]).detach().log_softmax(-1) for value in (x, start))
    if isinstance(target, Entropy):
        wanted = -(log.exp() * log).sum(-1) + (log0.exp() * log0).sum(-1)
    else:
        wanted = (log - log0).gather(1, found["action"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found["attr", "input"].sum(1), wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_at_an_embedding(flow: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 3))
    ids, other = torch.randint(9, (4, 3)), torch.randint(9, (4, 3))
    method = LRP(
        "deeplift",
        target=Target("output", 0),
        baseline={"input": other},
        input_modules=["0"],
        use_inputs=False,
        flow=flow,
    )
    with method.prepare(model) as run:
        found = run(td_of(ids))
    (relevance,) = list(found["attr"].values(True, True))
    wanted = (model(ids) - model(other)).detach()[:, 0]
    torch.testing.assert_close(relevance.flatten(1).sum(1), wanted)


@pytest.mark.parametrize("flow", FLOWS)
def test_what_modules_pass_on(flow: str) -> None:
    model, x, start = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    with LRP("deeplift", target=Target("output", 0), baseline=start, attribute="all", flow=flow).prepare(
        model
    ) as run:
        found = run(td_of(x))
    wanted = (model(x) - model(start)).detach()[:, 0]
    torch.testing.assert_close(found["attr", "input"].sum(1), wanted)
