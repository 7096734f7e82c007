"""A job explains each row as it is explained elsewhere, and says so where it cannot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from explaining import ATTR, job, policy, rows_of, steps
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import MultiAgentMLP

from tdhook import LRP, Contrast, References, Target
from tdhook.attribution import Averaged, ExpectedGradients
from tdhook.attribution.gradient import GradientTimesInput
from tdhook.attribution.integrated_gradients import IntegratedGradients
from tdhook.datasets import Job, Moments, Place
from tdhook.rl import Explain

METHODS: dict[str, Callable[[], Any]] = {
    "lrp": lambda: LRP("epsilon_plus", target=Target("action_value", "action")),
    "all": lambda: LRP("epsilon", target=Target("action_value", "all")),
    "contrast": lambda: LRP(
        "deeplift", target=Contrast(Target("action_value", 0), Target("action_value", 1)), baseline=0.5
    ),
    "ledger": lambda: LRP("epsilon", target=Target("action_value", "action"), ledger=True),
    "values": lambda: LRP("epsilon", target=Target("action_value", 1), values=True),
    "previous": lambda: LRP("deeplift", target=Target("action_value", "action"), baseline="previous"),
    "entry": lambda: LRP(
        "deeplift", target=Target("action_value", 0), baseline={"observation": ("next", "observation")}
    ),
    "gradient": lambda: GradientTimesInput(target=Target("action_value", "action")),
    "path": lambda: IntegratedGradients(target=Target("action_value", "action")),
}


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_explained_as_in_a_buffer(name: str, tmp_path: Path) -> None:
    data = steps().exclude("next") if name == "previous" else steps()
    done = job(tmp_path / "job", METHODS[name](), data, in_order=name == "previous")
    found = rows_of(done)
    timed = data.copy()
    timed.names = ["time"]
    whole = Explain(METHODS[name](), policy(), at_once=8)(timed)
    added = [key for key in whole.keys(True, True) if key not in data.keys(True, True)]
    assert {*added} == {*found.keys(True, True)}
    for key in added:
        torch.testing.assert_close(found[key], whole[key], rtol=1e-5, atol=1e-6)
    assert done.result().beside(data)[ATTR].shape[0] == 100


def test_means_are_those_of_the_source(tmp_path: Path) -> None:
    data = steps()
    method = LRP("deeplift", target=Target("action_value", 0), baseline="mean")
    found = rows_of(job(tmp_path / "job", method, data))
    mean = data["observation"].mean(0)
    expected = Explain(LRP("deeplift", target=Target("action_value", 0), baseline=mean), policy())(data)
    torch.testing.assert_close(found[ATTR], expected[ATTR], rtol=1e-4, atol=1e-5)
    own = References("mean", data=data[:3])
    other = LRP("deeplift", target=Target("action_value", 0), baseline=own)
    expected = Explain(
        LRP("deeplift", target=Target("action_value", 0), baseline=data["observation"][:3].mean(0)), policy()
    )(data)
    torch.testing.assert_close(
        rows_of(job(tmp_path / "other", other, data))[ATTR], expected[ATTR], rtol=1e-4, atol=1e-5
    )


def test_samples_are_the_same_in_each_run(tmp_path: Path) -> None:
    method = LRP("deeplift", target=Target("action_value", 0), baseline=References("sample", 3, spread=True))
    first, second = (rows_of(job(tmp_path / name, method)) for name in "ab")
    assert bool((first == second).all()) and ("spread", "observation") in first.keys(True)


def test_samples_are_those_of_the_row_whatever_the_chunk(tmp_path: Path) -> None:
    """And those that the batch as a whole has, compared with the same rows."""
    data, target = steps(), Target("action_value", 0)
    for name, method in {
        "lrp": LRP("deeplift", target=target, baseline=References("sample", 3)),
        "expected": ExpectedGradients(target, baseline="sample", samples=4),
        "averaged": Averaged(IntegratedGradients(target, steps=3), over=References("sample", 3)),
    }.items():
        one, other = (rows_of(job(tmp_path / f"{name}{n}", method, data, chunk=n))[ATTR] for n in (16, 37))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        expected = Explain(method.among(data), policy())(data.clone())[ATTR]
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def test_what_comes_next_is_explained(tmp_path: Path) -> None:
    data = steps()
    found = rows_of(job(tmp_path / "job", LRP("epsilon", target=Target("action_value", 0)), data, at="next"))
    expected = Explain(LRP("epsilon", target=Target("action_value", 0)), policy(), at="next")(data)
    key = ("attr", "next", "observation")
    torch.testing.assert_close(found[key], expected[key])


class Sums(nn.Module):
    """Sums what it saw so far, ``[batch, time, 4]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-2)


def test_trajectories_with_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TensorDictModule(nn.Sequential(Sums(), nn.Linear(4, 2)), ["observation"], ["value"])
    valid = torch.arange(6) < torch.tensor([6, 3, 5, 6, 1])[:, None]
    data = TensorDict({"observation": torch.randn(5, 6, 4), "collector": {"mask": valid}}, [5, 6])
    method = LRP("epsilon", target=Target("value", 0))
    expected = Explain(method, model, trajectories=True)(data)
    done = Job(method, model, data, tmp_path / "job", trajectories=True, chunk=2)
    torch.testing.assert_close(rows_of(done)[ATTR], expected[ATTR])
    assert bool((done.result().rows[ATTR][~valid] == 0).all())
    with pytest.raises(ValueError, match=r"rows that are trajectories, \[rows, time\]"):
        Job(method, policy(), steps(), tmp_path / "flat", trajectories=True)


def test_chunks_of_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    valid = torch.arange(8) < torch.tensor([8, 2, 0])[:, None]
    data = TensorDict({"observation": torch.randn(3, 8, 4), "collector": {"mask": valid}}, [3, 8])
    method = LRP("epsilon", target=Target("action_value", 0))
    expected = Explain(method, policy())(data)[ATTR]
    for source, chunk in ((data, 1), (data.reshape(-1), 4)):
        done = Job(method, policy(), source, tmp_path / str(chunk), chunk=chunk)
        torch.testing.assert_close(rows_of(done)[ATTR].reshape(3, 8, 4), expected)


def test_frames_are_prepared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    model = TensorDictModule(net, ["pixels"], ["value"])
    data = TensorDict({"pixels": torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)}, [10])

    def as_numbers(rows: TensorDictBase) -> TensorDictBase:
        return rows.copy().set("pixels", rows["pixels"] / 255)

    method = LRP("epsilon_plus", target=Target("value", 0))
    done = Job(method, model, data, tmp_path / "job", prepare=as_numbers, chunk=4)
    expected = Explain(method, model)(as_numbers(data))
    torch.testing.assert_close(rows_of(done)["attr", "pixels"], expected["attr", "pixels"])


def test_frames_of_bytes_that_the_model_casts(tmp_path: Path) -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).float() / 255

    torch.manual_seed(0)
    model = TensorDictModule(nn.Sequential(Scales(), nn.Linear(12, 2)), ["pixels"], ["value"])
    data = TensorDict({"pixels": torch.randint(256, (10, 3, 2, 2), dtype=torch.uint8)}, [10])
    method = LRP("epsilon_plus", target=Target("value", 0))
    found = rows_of(Job(method, model, data, tmp_path / "job"))
    torch.testing.assert_close(
        found["attr", "pixels"], method.wrap(model)(data.float())["attr", "pixels"].float()
    )


@pytest.mark.filterwarnings("ignore:input 'token' is torch.int64")
def test_nothing_to_explain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    model = TensorDictModule(net, ["token"], ["value"])
    data = TensorDict({"token": torch.randint(10, (6,))}, [6])
    with pytest.raises(ValueError, match="rows 0 to 1: "):
        Job(LRP("epsilon", target=Target("value", 0)), model, data, tmp_path / "none")
    inside = LRP("epsilon", target=Target("value", 0), use_inputs=False, input_modules=["module.0"])
    assert rows_of(Job(inside, model, data, tmp_path / "job"))["attr", "module.0"].shape == (6, 4)


@pytest.mark.parametrize(
    "which, expected",
    [
        (slice(10, 50, 3), list(range(10, 50, 3))),
        (range(5), list(range(5))),
        ([7, 3, 4, 99], [7, 3, 4, 99]),
        (torch.arange(100) % 9 == 2, list(range(2, 100, 9))),
    ],
)
def test_rows_that_are_chosen(which: Any, expected: list[int], tmp_path: Path) -> None:
    found = rows_of(job(tmp_path / "job", rows=which))
    whole = rows_of(job(tmp_path / "whole"))
    torch.testing.assert_close(found[ATTR], whole[ATTR][expected])


def test_every_other_row_of_a_source_in_memory(tmp_path: Path) -> None:
    whole, found = (rows_of(job(tmp_path / str(n), source=steps()[::n], chunk=1)) for n in (1, 2))
    torch.testing.assert_close(found[ATTR], whole[ATTR][::2])


def test_the_step_before_is_that_of_the_source(tmp_path: Path) -> None:
    data = steps().exclude("next")
    method = LRP("deeplift", target=Target("action_value", "action"), baseline="previous")
    whole = rows_of(job(tmp_path / "whole", method, data, in_order=True))
    part = rows_of(job(tmp_path / "part", method, data, in_order=True, rows=slice(30, 50)))
    assert bool(part[ATTR][0].any())
    torch.testing.assert_close(part[ATTR], whole[ATTR][30:50])
    for which in (slice(0, 50, 3), [7, 3, 4], torch.arange(100) % 9 == 2):
        with pytest.raises(
            ValueError, match=r"in_order=True .* give a stretch of them, rows=slice\(10, 50\)"
        ):
            job(tmp_path / "none", method, data, in_order=True, rows=which)


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    for which, odd in (([3, 100], 100), ([3, -1], -1), (torch.tensor([-2]), -2)):
        with pytest.raises(
            IndexError, match=f"rows= names row {odd}, and the source has 100: rows count from 0"
        ):
            job(tmp_path / "job", rows=which)
    for none in (torch.zeros(3, dtype=torch.bool), torch.tensor(3), 3, "abc", [[1]], [0.5], {1, 2}):
        with pytest.raises(TypeError, match="row numbers, or a truth value for each of the 100 rows"):
            job(tmp_path / "job", rows=none)
    with pytest.raises(ValueError, match="the source has no rows"):
        job(tmp_path / "job", rows=slice(0, 0))
    assert not (tmp_path / "job").exists()


def test_bytes_are_the_same_however_rows_are_met(tmp_path: Path) -> None:
    data, method = steps(), LRP("deeplift", target=Target("action_value", 1), baseline=0.0)
    forwards, backwards = (
        job(tmp_path / name, method, data, reduce=[Moments(by="action")]) for name in ("a", "b")
    )
    forwards.work()
    done = 0

    def once() -> bool:
        nonlocal done
        done += 1
        return done > 1

    for rank in (5, 3, 1, 6, 0, 2, 4, 3):
        done = 0
        backwards.work(place=Place(rank, 7), until=once)
    assert backwards.status().finished
    for path in sorted((tmp_path / "a").rglob("*")):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        if path.is_file() and "workers" not in path.parts:
            assert path.read_bytes() == other.read_bytes(), path


@pytest.mark.parametrize("share", [True, False])
def test_agents_with_weights_of_their_own(share: bool, tmp_path: Path) -> None:
    """Multi-agent networks keep their weights in a TensorDict, and their network on the device "meta"."""

    def team(seed: int) -> TensorDictModule:
        torch.manual_seed(seed)
        sizes = {"n_agent_inputs": 4, "n_agent_outputs": 2, "n_agents": 3, "depth": 1, "num_cells": 5}
        net = MultiAgentMLP(**sizes, centralized=True, share_params=share)
        return TensorDictModule(net, [("agents", "seen")], [("agents", "value")])

    data = TensorDict({"agents": TensorDict({"seen": torch.randn(6, 3, 4)}, [6, 3])}, [6])
    method, checkpoints = LRP("epsilon", target=Target(("agents", "value"), 0)), {"a": team(1), "b": team(2)}
    done = Job(method, team(0), data, tmp_path / "job", chunk=4)
    with pytest.raises(ValueError, match=r"model\.weights"):
        Job(method, team(1), data, tmp_path / "job", chunk=4)
    over_time = Job(method, team(0), data, tmp_path / "both", chunk=4, checkpoints=checkpoints)
    expected = [method.wrap(team(seed))(data.clone())["attr", "agents", "seen"] for seed in range(3)]
    torch.testing.assert_close(rows_of(done)["attr", "agents", "seen"], expected[0])
    torch.testing.assert_close(rows_of(over_time)["attr", "agents", "seen"], torch.stack(expected[1:]))


class Draws(nn.Linear):
    """Draws noise, and lets other threads run meanwhile."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.001)
        return super().forward(x + torch.randn_like(x))


def test_bytes_are_the_same_beside_another_thread(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TensorDictModule(Draws(4, 2), ["observation"], ["action_value"])

    def made(name: str) -> Job:
        method = LRP("epsilon", target=Target("action_value", 0))
        return Job(method, model, steps(), tmp_path / name, chunk=10, at_once=5)

    alone, jobs = rows_of(made("alone")), [made(name) for name in "ab"]
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    workers = [threading.Thread(target=one.work) for one in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(one.result().rows[ATTR], alone[ATTR]) for one in jobs)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), drawn)
