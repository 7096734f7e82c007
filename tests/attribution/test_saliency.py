"""Saliency of policies: blurred spots, squares of changes, and SARFA's equations, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import SARFA, PerturbationSaliency
from tdhook.evaluation import explained_by
from tdhook.perturbing.baselines import blurred
from tdhook.targets import Advantage, AtStep, Computed, Contrast


def policy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 10 * 8, 4), nn.Tanh(), nn.Linear(4, 4)
    ).double()


def frames(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.rand(*batch, 2, 12, 10).double()}, list(batch))


def spots(x: Tensor, distance: int, width: float) -> list[list[Tensor]]:
    """``x`` with each of the spots blurred, by its place in the grid."""
    blur, found = blurred(3.0)(x), []
    rows, columns = torch.arange(12).double().unsqueeze(1), torch.arange(10).double()
    for i in range(-(-12 // distance)):
        found.append([])
        for j in range(-(-10 // distance)):
            centre = (i * distance + (distance - 1) / 2, j * distance + (distance - 1) / 2)
            mask = torch.exp(-((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / (2 * width**2))
            found[-1].append(x * (1 - mask) + blur * mask)
    return found


def upsampled(scores: list[list[Tensor]], distance: int) -> Tensor:
    grid = torch.stack([torch.stack(row, -1) for row in scores], -2).unsqueeze(1)
    size = (grid.shape[-2] * distance, grid.shape[-1] * distance)
    return F.interpolate(grid, size=size, mode="bilinear")[:, 0, :12, :10]


@pytest.mark.parametrize("distance, width", [(4, 2.0), (5, 5.0)])
def test_squares_of_all_outputs(distance, width) -> None:
    net, td = policy(), frames(3)
    with torch.no_grad():
        base = net(td["input"])
        scores = [
            [(net(x) - base).square().sum(-1) / 2 for x in row] for row in spots(td["input"], distance, width)
        ]
    expected = upsampled(scores, distance)
    for target in ("output", None, Target("output")):
        method = PerturbationSaliency(target, distance=distance, width=width)
        found = method.wrap(net)(td.clone())["attr", "input"]
        assert found.shape == (3, 2, 12, 10)
        torch.testing.assert_close(found.sum(1), expected, rtol=1e-9, atol=1e-12)
    one = PerturbationSaliency(Target("output", 2), distance=distance, width=width).wrap(net)(td.clone())
    each = [
        [(net(x) - base)[:, 2].detach().square() / 2 for x in row]
        for row in spots(td["input"], distance, width)
    ]
    torch.testing.assert_close(one["attr", "input"].sum(1), upsampled(each, distance), rtol=1e-9, atol=1e-12)


def by_hand(before: Tensor, after: Tensor, action: int) -> float:
    """Equations 4 to 7 for one element."""
    lost = before.softmax(-1)[action] - after.softmax(-1)[action]
    rest = [i for i in range(len(before)) if i != action]
    p, q = after[rest].softmax(-1), before[rest].softmax(-1)
    alike = 1 / (1 + (p * (p / q).log()).sum())
    return float(2 * alike * lost / (alike + lost)) if lost > 0 else 0.0


@pytest.mark.parametrize("index", ["argmax", 2])
def test_sarfa_written_out(index) -> None:
    net, td = policy(), frames(3)
    with torch.no_grad():
        base = 5 * net(td["input"])
        scores = [
            [
                torch.tensor(
                    [
                        by_hand(base[k], 5 * net(x)[k], int(base[k].argmax()) if index == "argmax" else index)
                        for k in range(3)
                    ],
                    dtype=torch.float64,
                )
                for x in row
            ]
            for row in spots(td["input"], 4, 2.0)
        ]

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 5 * net(x)

    found = SARFA(Target("output", index), distance=4, width=2.0).wrap(Scaled())(td.clone())
    torch.testing.assert_close(found["attr", "input"].sum(1), upsampled(scores, 4), rtol=1e-9, atol=1e-12)
    shaped = SARFA(Target("output", index), distance=4, width=2.0).wrap(Scaled())(td.clone().reshape(3, 1))
    torch.testing.assert_close(shaped["attr", "input"][:, 0], found["attr", "input"])


@pytest.mark.parametrize("index", ["argmax", 1])
def test_values_that_the_target_computes(index: str | int) -> None:
    net, td = policy(), frames(2)

    def found(method: PerturbationSaliency | SARFA) -> Tensor:
        return method.wrap(net)(td.clone())["attr", "input"]

    # A softmax over advantages is that over values.
    torch.testing.assert_close(
        found(SARFA(Advantage("output", index))), found(SARFA(Target("output", index)))
    )
    method = SARFA(Advantage("output", index))
    same = explained_by({"sarfa": method}, net, td, target=method.target)["sarfa"]
    torch.testing.assert_close(same["attr", "input"], found(method))
    spread = Computed(lambda outputs, _: outputs["output"].std(-1))
    twice = Computed(lambda outputs, _: 2 * outputs["output"].std(-1))
    torch.testing.assert_close(found(PerturbationSaliency(twice)), 4 * found(PerturbationSaliency(spread)))
    with pytest.raises(ValueError, match="SARFA explains one action"):
        found(SARFA(spread))


def test_masked_actions_take_no_part() -> None:
    net, td = policy(), frames(3)

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([net(x), torch.full((len(x), 1), -torch.inf).double()], -1)

    free = SARFA(Target("output", 0)).wrap(net)(td.clone())["attr", "input"]
    masked = SARFA(Target("output", 0)).wrap(Masked())(td.clone())["attr", "input"]
    torch.testing.assert_close(masked, free)


def test_the_actor_and_the_critic() -> None:
    net = policy()
    actor = TensorDictModule(net, ["pixels"], ["logits"])
    td = TensorDict({"pixels": frames(2)["input"]}, [2])
    found = PerturbationSaliency("logits").wrap(actor)(td.clone())
    assert (found["attr", "pixels"] >= 0).all()
    assert found["attr", "pixels"].any()
    critic = TensorDictModule(nn.Sequential(net, nn.Linear(4, 1).double()), ["pixels"], ["state_value"])
    assert PerturbationSaliency("state_value").wrap(critic)(td.clone())["attr", "pixels"].any()


class Recurrent(nn.Module):
    """Pictures one after the other, ``[*batch, time, 1, height, width]``."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.linspace(-1, 1, 3 * 36).reshape(3, 36).double()
        return (x.flatten(2) @ weight.T).tanh().cumsum(1)


@pytest.mark.parametrize("method", [PerturbationSaliency, SARFA])
def test_one_step_of_a_sequence(method) -> None:
    torch.manual_seed(0)
    td = TensorDict({"input": torch.rand(2, 3, 1, 6, 6).double()}, [2, 3])
    index = 0 if method is SARFA else None
    target = AtStep(Target("output", index), 1)
    found = method(target, distance=3, width=1.0).wrap(Recurrent())(td.clone())["attr", "input"]
    assert found.shape == (2, 3, 1, 6, 6)
    assert not found[:, 2].any()
    assert found[:, 0].any()
    net, x = Recurrent(), td["input"]
    rows = torch.arange(6).double()
    mask = torch.exp(-((rows.unsqueeze(1) - 1) ** 2 + (rows - 1) ** 2) / 2.0)
    changed = x.clone()
    changed[:, 0] = torch.lerp(x[:, 0], blurred(3.0)(x[:, 0]), mask)
    before, after = net(x)[:, 1], net(changed)[:, 1]
    if method is SARFA:
        expected = torch.tensor([by_hand(before[k], after[k], 0) for k in range(2)], dtype=torch.float64)
    else:
        expected = (after - before).square().sum(-1) / 2
    torch.testing.assert_close(found[:, 0, 0, 1, 1], expected, rtol=1e-9, atol=1e-12)


def test_one_graph() -> None:
    net, td = policy(), frames(3)
    for method in (PerturbationSaliency, SARFA):
        target = Target("output", 1 if method is SARFA else None)
        eager = method(target).wrap(net)(td.clone())
        graph = method(target, compile={"backend": "aot_eager"}).wrap(net)
        for _ in range(2):
            torch.testing.assert_close(graph(td.clone()), eager)


def test_mistakes() -> None:
    net, td = policy(), frames(3)
    with pytest.raises(ValueError, match="SARFA has spots for features; Ablation takes features="):
        SARFA(features="whole")
    with pytest.raises(
        ValueError, match="spots lie at least one pixel apart and have a positive width, got distance=0"
    ):
        PerturbationSaliency(distance=0)
    for target in ("output", Target("output", "all"), Contrast(Target("output", 0), Target("output", 1))):
        with pytest.raises(ValueError, match="SARFA explains one action among the values of at least two"):
            SARFA(target).wrap(net)(td.clone())
    vectors = TensorDict({"input": torch.randn(3, 4)}, [3])
    with pytest.raises(ValueError, match="PerturbationSaliency is of pictures"):
        PerturbationSaliency(baseline=0.0).wrap(nn.Linear(4, 2))(vectors)


@pytest.mark.parametrize(
    "method", [SARFA(Target("output", "argmax")), PerturbationSaliency("output")], ids=["sarfa", "all"]
)
def test_in_hindsight_and_beside_padding(method: PerturbationSaliency | SARFA) -> None:
    """What a batch says was done is explained there, and steps that are padding have nothing."""
    rl = pytest.importorskip("tdhook.rl.explain")
    net, td = policy(), frames(3, 2)
    expected = method.wrap(net)(td.clone())["attr", "input"]
    padded = td.clone().set("mask", torch.tensor([[True, True], [True, False], [True, True]]))
    module = TensorDictModule(net, ["input"], ["output"])
    for given, mask in ((td, None), (padded, "mask")):
        found = rl.Explain(method, module, mask_key=mask)(given.clone())["attr", "input"]
        wanted = expected if mask is None else expected * padded["mask"].reshape(3, 2, 1, 1, 1)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_sarfa_of_steps_that_depend_on_each_other_asks_for_one() -> None:
    td = TensorDict({"input": torch.rand(2, 3, 1, 6, 6).double()}, [2, 3])
    with pytest.raises(ValueError, match=r"batch \[2, 3\] depend on each other along its axis 1.*AtStep"):
        SARFA(Target("output", 0), distance=3, width=1.0).wrap(Recurrent())(td)
