"""Frames of rows that are trajectories: what each step gave to a unit in the one in which it mattered."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.concepts import ReferenceSamples
from tdhook.targets import Through
from tdhook.targets.outputs import Key

ROWS, TIME, SIZE, UNITS = 24, 6, 3, 5
BEFORE, AFTER = "gate", "out"
"""Of each step for itself, and of all that were before it."""


class Recurrent(nn.Module):
    """Remembers what it saw, ``[batch, time, features]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate = nn.Linear(SIZE, UNITS, bias=False), nn.ReLU()
        self.memory, self.out = nn.GRU(UNITS, UNITS, batch_first=True), nn.ReLU()
        self.head = nn.Linear(UNITS, 2)

    def forward(self, observation: Tensor) -> Tensor:
        return self.head(self.out(self.memory(self.gate(self.embed(observation)))[0]))


def policy() -> TensorDictModule:
    torch.manual_seed(0)
    return TensorDictModule(Recurrent(), ["observation"], ["action_value"]).double()


def trajectories(rows: int = ROWS) -> TensorDict:
    torch.manual_seed(1)
    found = TensorDict({"observation": torch.randn(rows, TIME, SIZE).double()}, [rows, TIME])
    found["action"] = torch.randint(2, (rows, TIME))
    return found


def method(**options: object) -> LRP:
    return LRP("epsilon", target=Target("action_value", "action"), **options)  # type: ignore[arg-type]


def counted(layer: str, data: TensorDict, by: LRP | None = None, **options: object) -> ReferenceSamples:
    samples = ReferenceSamples(by or method(), layer, top=5, groups="action")
    return samples.fold(policy(), data, trajectories=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [BEFORE, AFTER])
def test_relevance_is_that_of_the_unit_in_its_step(layer: str) -> None:
    data, net = trajectories(), policy()
    samples = counted(layer, data)
    frames = samples.frames(net, data, 2, group=1, trajectories=True)
    best = samples.found.best(2, 1)
    assert torch.equal(frames["step"], best["step"]) and len(best["step"].unique()) > 1
    rows = data[best["row"]]
    assert (frames["data", "observation"] == rows["observation"]).all() and frames["data"].shape == (5, TIME)
    marks = torch.zeros(5, TIME, UNITS, dtype=torch.bool)
    marks[torch.arange(5), best["step"], 2] = True
    target = Through(Target("action_value", "action"), layer, Key("marks"))
    expected = LRP("epsilon", target=target).wrap(net)(rows.clone().set("marks", marks))
    torch.testing.assert_close(frames["attr", "observation"], expected["attr", "observation"])
    assert frames["attr", "observation"].shape == (5, TIME, SIZE)


def test_relevance_is_of_earlier_steps_and_sums_to_the_amount() -> None:
    data, net = trajectories(), policy()
    frames = counted(BEFORE, data).frames(net, data, 1, trajectories=True)
    time = torch.arange(TIME)
    here = time == frames["step"].unsqueeze(-1)
    assert (frames["attr", "observation"][~here] == 0).all()
    torch.testing.assert_close(
        frames["attr", "observation"].sum((1, 2)), frames["amount"], rtol=1e-4, atol=1e-8
    )
    frames = counted(AFTER, data).frames(net, data, 1, trajectories=True)
    later = time > frames["step"].unsqueeze(-1)
    assert (frames["attr", "observation"][later] == 0).all()
    assert (frames["attr", "observation"][~later] != 0).all()


def test_the_box_has_the_steps_that_the_unit_depends_on() -> None:
    data, net = trajectories(), policy()
    frames = counted(BEFORE, data).frames(net, data, 1, trajectories=True)
    assert torch.equal(frames["field", "observation"][:, 0, 0], frames["step"])
    assert torch.equal(frames["field", "observation"][:, 1, 0], frames["step"] + 1)
    frames = counted(AFTER, data).frames(net, data, 1, trajectories=True, at_once=2 * TIME)
    assert (frames["field", "observation"][:, 0] == 0).all()
    assert torch.equal(frames["field", "observation"][:, 1, 0], frames["step"] + 1)
    assert (frames["field", "observation"][:, 1, 1] == SIZE).all()


def test_padding_is_in_no_frame() -> None:
    """Whatever stands there, it is no action, and nothing passes there."""
    data = trajectories()
    valid = torch.arange(TIME) < torch.arange(ROWS).unsqueeze(-1) % TIME + 1
    padded = data.clone()
    padded["action"][~valid] = 99
    padded["collector", "mask"] = valid
    samples = counted(AFTER, padded)
    frames = samples.frames(policy(), padded, 1, trajectories=True)
    at = frames["row"], frames["step"]
    assert valid[at].all()
    for row, step, found in zip(*at, frames["attr", "observation"], strict=True):
        short = data[row : row + 1, : int(valid[row].sum())]
        marks = torch.zeros(*short.shape, UNITS, dtype=torch.bool)
        marks[0, step, 1] = True
        target = Through(Target("action_value", "action"), AFTER, Key("marks"))
        alone = LRP("epsilon", target=target).wrap(policy())(short.clone().set("marks", marks))
        torch.testing.assert_close(found[: short.shape[1]], alone["attr", "observation"][0])
        assert (found[short.shape[1] :] == 0).all()


def test_what_policies_read_below_an_entry_that_is_made() -> None:
    data, net = trajectories(), policy()
    raw = TensorDict({"next": {"seen": data["observation"] * 3, "action": data["action"]}}, [ROWS, TIME])
    raw["action"] = data["action"]

    def prepare(rows: TensorDict) -> TensorDict:
        rows = rows.copy()
        rows["next", "observation"] = rows["next", "seen"] / 3
        return rows

    reading = {"at": "next", "prepare": prepare}
    frames = counted(AFTER, raw, **reading).frames(net, raw, 2, group=0, trajectories=True, **reading)  # type: ignore[arg-type]
    expected = counted(AFTER, data).frames(net, data, 2, group=0, trajectories=True)
    torch.testing.assert_close(frames["attr", "next", "observation"], expected["attr", "observation"])
    assert torch.equal(frames["field", "next", "observation"], expected["field", "observation"])
    assert sorted(frames["data"].keys()) == ["action", "next"]


@pytest.mark.parametrize("baseline", ["mean", "previous"])
def test_a_baseline_is_that_of_the_whole_source(baseline: str) -> None:
    data, net = trajectories(), policy()
    samples = counted(
        AFTER, data, LRP("deeplift", target=Target("action_value", "action"), baseline=baseline)
    )
    frames = samples.frames(net, data, 1, trajectories=True)
    torch.testing.assert_close(
        frames["attr", "observation"].sum((1, 2)), frames["amount"], rtol=1e-6, atol=1e-8
    )
