"""Frames that a unit responds to, with the relevance that passes it, and the part that it sees."""

from __future__ import annotations

import pytest
import torch
from responding import LAYER, method, policy, steps
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential

from tdhook import LRP, Target
from tdhook.concepts import ReferenceSamples
from tdhook.targets import Through


def samples(**options: object) -> ReferenceSamples:
    return ReferenceSamples(method(), LAYER, axis=1, top=4, groups="action", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["relevance", "value"])
def test_frames_of_a_unit(by: str) -> None:
    data, net = steps(), policy()
    counted = samples(by=by).fold(net, data)
    frames = counted.frames(net, data, 3, group=2)
    best = counted.found.best(3, 2)
    rows = best["row"]
    assert torch.equal(frames["row"], rows) and torch.equal(
        frames["note", "step_count"], best["note", "step_count"]
    )
    assert torch.equal(frames["data", "pixels"], data["pixels"][rows])
    target = Through(Target("action_value", "action"), LAYER, 3, axis=1)
    expected = LRP("epsilon_plus", target=target).wrap(net)(data[rows].clone())["attr", "pixels"]
    torch.testing.assert_close(frames["attr", "pixels"], expected, rtol=1e-4, atol=1e-6)
    place = frames["place"]
    corners = torch.stack([place, place + 4], 1)  # 3 x 3 pixels of each of 2 x 2 places
    assert torch.equal(frames["field", "pixels"][:, :, 1:], corners)
    assert ("field", "pixels") not in counted.frames(net, data, 3, fields=False).keys(True)


def test_frames_of_other_data_or_another_policy_are_refused() -> None:
    data, net = steps(), policy()
    counted = samples().fold(net, data)
    with pytest.raises(ValueError, match="not known to be these"):
        counted.frames(net, steps(seed=5), 3)
    with pytest.raises(ValueError, match="rows were counted with other weights of the policy"):
        counted.frames(policy(2), data, 3)
    batches = samples()
    batches.update(batches.wrap(net)(data.clone()))
    assert len(batches.frames(net, data, 3)) == 4  # what is not known is not compared


def test_the_relevance_of_a_unit_is_the_amount_and_inside_its_field() -> None:
    data, net = steps(), policy()
    linear = LRP("epsilon", target=Target("action_value", "action"))
    for layer in net.module:
        if hasattr(layer, "bias"):
            torch.nn.init.zeros_(layer.bias)
    counted = ReferenceSamples(linear, LAYER, axis=1, top=6).fold(net, data)
    frames = counted.frames(net, data, 1)
    torch.testing.assert_close(
        frames["attr", "pixels"].double().flatten(1).sum(-1), frames["amount"], rtol=1e-3, atol=1e-5
    )


def test_rows_that_are_read_otherwise() -> None:
    data, net = steps(120), policy()
    raw = TensorDict(
        {"next": {"frame": data["pixels"].double() * 7, "action": data["action"]}, "action": data["action"]},
        [120],
    )

    def prepare(rows: TensorDictBase) -> TensorDictBase:
        rows = rows.copy()
        rows["next", "pixels"] = (rows["next", "frame"] / 7).float()
        return rows

    reading = {"at": "next", "prepare": prepare}
    counted = samples(notes=[]).fold(net, raw, **reading)  # type: ignore[arg-type]
    plain = samples(notes=[]).fold(net, data)
    assert torch.equal(counted.found.best(2)["row"], plain.found.best(2)["row"])
    frames, expected = counted.frames(net, raw, 2, **reading), plain.frames(net, data, 2)  # type: ignore[arg-type]
    torch.testing.assert_close(
        frames["attr", "next", "pixels"], expected["attr", "pixels"], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(frames["field", "next", "pixels"], expected["field", "pixels"])


def test_steps_of_rows_that_have_several() -> None:
    data, net = steps(120), policy()
    counted, flat = samples().fold(net, data.reshape(12, 10)), samples().fold(net, data)
    frames, expected = counted.frames(net, data.reshape(12, 10), 4), flat.frames(net, data, 4)
    assert torch.equal(frames["row"] * 10 + frames["step"], expected["row"])
    assert torch.equal(frames["data", "pixels"], expected["data", "pixels"])
    torch.testing.assert_close(frames["attr", "pixels"], expected["attr", "pixels"], rtol=1e-4, atol=1e-6)
    assert torch.equal(frames["field", "pixels"], expected["field", "pixels"])


def test_what_the_inputs_are_compared_with_is_not_a_value_of_the_layer() -> None:
    data, net = steps(100), policy()
    linear = TensorDictSequential(
        TensorDictModule(net.module[:3], ["pixels"], ["hidden"]),
        TensorDictModule(net.module[3:], ["hidden"], ["action_value"]),
    )
    by = LRP("deeplift", target=Target("action_value", "action"), baseline=0.5)
    found = ReferenceSamples(by, LAYER, axis=1, top=6).fold(net, data).found
    through = Through(Target("action_value", "action"), LAYER, "all", axis=1)
    passed = LRP("deeplift", target=through, baseline=0.5).wrap(net)(data.clone())["attr", "pixels"]
    torch.testing.assert_close(found.mean(), passed.double().flatten(2).sum(-1).mean(0), rtol=1e-4, atol=1e-6)
    by_key = ReferenceSamples(by, "hidden", axis=1, top=6).fold(linear, data)
    torch.testing.assert_close(by_key.found.mean(), found.mean(), rtol=1e-4, atol=1e-6)
    assert torch.equal(by_key.found.best(2)["row"], found.best(2)["row"])


@pytest.mark.parametrize("in_order", [False, True], ids=["mean", "previous"])
def test_what_is_compared_with_is_of_the_whole_source(in_order: bool) -> None:
    """The mean of all rows, and the row before: not those of the few that a unit responds to."""
    data, net = steps(200), policy()
    by = LRP(
        "deeplift",
        target=Target("action_value", "action"),
        baseline="previous" if in_order else "mean",
    )
    counted = ReferenceSamples(by, LAYER, axis=1, top=6).fold(net, data, in_order=in_order)
    frames = counted.frames(net, data, 1, in_order=in_order)
    torch.testing.assert_close(
        frames["attr", "pixels"].double().flatten(1).sum(-1), frames["amount"], rtol=1e-3, atol=1e-5
    )


def test_units_of_what_a_module_is_given() -> None:
    data, net = steps(120), policy()
    given = ReferenceSamples(method(), "3:input", axis=1, top=4).fold(net, data)
    made = ReferenceSamples(method(), "2", axis=1, top=4).fold(net, data)
    torch.testing.assert_close(given.found.mean(), made.found.mean())
    frames, expected = given.frames(net, data, 3), made.frames(net, data, 3)
    assert torch.equal(frames["row"], expected["row"])
    torch.testing.assert_close(frames["attr", "pixels"], expected["attr", "pixels"])
    assert torch.equal(frames["field", "pixels"], expected["field", "pixels"])
