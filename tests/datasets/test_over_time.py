"""What checkpoints look at, after the fact, is what a tracker saw while they were trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target
from tdhook.datasets import Job, Moments, OverTime, Reservoir
from tdhook.evaluation.similarity import drift
from tdhook.rl import AttributionTracker

METHOD = LRP("epsilon", target=Target("y", 0))


def model() -> TensorDictModule:
    torch.manual_seed(0)
    return TensorDictModule(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), ["x"], ["y"])


def trained(home: Path) -> tuple[TensorDict, dict[str, Path], AttributionTracker]:
    """A training of three steps, whose checkpoints are files, and which was watched."""
    net = model()
    data = TensorDict({"x": torch.randn(40, 3)}, [40])
    tracker = AttributionTracker(METHOD, net, probe=data)
    files = {}
    for step in range(3):
        tracker.update(data, step=step)
        files[f"step {step}"] = home / f"{step}.pt"
        torch.save(net.state_dict(), files[f"step {step}"])
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return data, files, tracker


@pytest.mark.parametrize("keep", ["all", "compressed", None])
def test_curves_are_those_of_the_tracker(keep: str | None, tmp_path: Path) -> None:
    data, files, tracker = trained(tmp_path)
    reduce = [Moments(), Reservoir(40)]
    job = Job(METHOD, model(), data, tmp_path / "job", checkpoints=files, chunk=16, keep=keep, reduce=reduce)
    assert job.work().finished
    over_time = OverTime(job.result())
    assert over_time.names == ("step 0", "step 1", "step 2")
    found = over_time.curves()
    assert found.keys() == tracker.history.keys()
    for name, series in tracker.history.items():
        assert found[name] == pytest.approx(series, rel=1e-5, abs=1e-6, nan_ok=True), name
    assert math.isnan(found["drift/first"][0]) and found["drift/first"][2] > 0.01
    apart = over_time.drifts()
    assert torch.equal(apart, apart.T) and apart[0, 2] == over_time.drift("step 0", "step 2")
    assert over_time.curves(["a", "b", "c"]).keys() >= {"share/a", "relevance/c"}
    with pytest.raises(ValueError, match="there are 2 names for 3 features"):
        over_time.curves(["a", "b"])
    with pytest.raises(KeyError, match="there is no checkpoint 'last'; there are step 0, step 1, step 2"):
        over_time.drift("last", 0)


def test_rows_of_each_checkpoint(tmp_path: Path) -> None:
    data, files, _ = trained(tmp_path)
    job = Job(METHOD, model(), data, tmp_path / "job", checkpoints=files, chunk=16)
    assert job.work().finished
    rows = job.result().rows
    assert rows.batch_size == (3, 40)
    for i, path in enumerate(files.values()):
        net = model()
        net.load_state_dict(torch.load(path, weights_only=True))
        expected = METHOD.wrap(net)(data.clone())
        torch.testing.assert_close(rows["attr", "x"][i], expected["attr", "x"])


@pytest.mark.parametrize("keep", ["all", None])
def test_each_of_several_inputs_has_its_own_drift(keep: str | None, tmp_path: Path) -> None:
    def net(seed: int) -> TensorDictModule:
        torch.manual_seed(seed)
        return TensorDictModule(nn.Bilinear(3, 2, 2), ["x", ("more", "z")], ["y"])

    keys = ["x", ("more", "z")]
    data = TensorDict({"x": torch.randn(9, 3), "more": {"z": torch.randn(9, 2)}}, [9])
    reduce = [
        kind for key in keys for kind in (Moments(key, name=f"m{key}"), Reservoir(9, key, name=f"r{key}"))
    ]
    checkpoints = {str(seed): net(seed).state_dict() for seed in range(2)}
    job = Job(METHOD, net(0), data, tmp_path / "job", checkpoints=checkpoints, keep=keep, reduce=reduce)
    assert job.work().finished
    first, second = (METHOD.wrap(net(seed))(data.clone())["attr"] for seed in range(2))
    for key in keys:
        expected = drift(first[key], second[key]).mean().item()
        assert OverTime(job.result(), key).drift(0, 1) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"there is relevance of 'x', .*: say with key= of which"):
        OverTime(job.result()).curves()
    with pytest.raises(ValueError, match=r"there is relevance of 'x', .*: say with key= of which"):
        OverTime(job.result()).drift(0, 1)


def test_what_is_half_done_is_not_compared(tmp_path: Path) -> None:
    data, files, _ = trained(tmp_path)
    reduce = [Moments(), Reservoir(40)]
    job = Job(METHOD, model(), data, tmp_path / "job", checkpoints=files, chunk=16, keep=None, reduce=reduce)
    done: list[int] = []
    job.work(on_done=done.append, until=lambda: len(done) == 5)
    with pytest.raises(RuntimeError, match="on the same rows, and not all are explained yet"):
        OverTime(job.result(partial=True))


def test_what_does_not_tell_of_time(tmp_path: Path) -> None:
    data, files, _ = trained(tmp_path)
    once = Job(METHOD, model(), data, tmp_path / "once")
    once.work()
    with pytest.raises(ValueError, match="this job has one set of weights"):
        OverTime(once.result())
    kept = Job(METHOD, model(), data, tmp_path / "kept", checkpoints=files)
    kept.work()
    with pytest.raises(ValueError, match=r"no moments tell of features: give the job reduce=\[Moments\(\)\]"):
        OverTime(kept.result()).curves()
    reduced = Job(
        METHOD, model(), data, tmp_path / "reduced", checkpoints=files, keep=None, reduce=[Moments()]
    )
    reduced.work()
    assert "drift/first" not in OverTime(reduced.result()).curves()
    with pytest.raises(ValueError, match="no rows tell of drift"):
        OverTime(reduced.result()).drift(0, 1)


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    data, _, _ = trained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        Job(METHOD, model(), data, tmp_path / "a", checkpoints={"first": tmp_path / "none.pt"})
    torch.save({"loss": 0.0}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="holds no weights: a checkpoint is a state_dict"):
        Job(METHOD, model(), data, tmp_path / "b", checkpoints={"first": tmp_path / "odd.pt"})
    with pytest.raises(ValueError, match="these weights do not fit"):
        Job(METHOD, model(), data, tmp_path / "c", checkpoints={"first": nn.Linear(3, 2)})
    torch.save({"state_dict": model().state_dict(), "step": 3}, tmp_path / "saved.pt")
    found = Job(METHOD, model(), data, tmp_path / "d", checkpoints={"first": tmp_path / "saved.pt"})
    assert found.work().finished


def test_other_checkpoints_are_another_job(tmp_path: Path) -> None:
    data, files, _ = trained(tmp_path)
    Job(METHOD, model(), data, tmp_path / "job", checkpoints=files)
    torch.save(torch.load(files["step 0"], weights_only=True), files["step 2"])
    with pytest.raises(ValueError, match=r"which differs in checkpoints\.step 2"):
        Job(METHOD, model(), data, tmp_path / "job", checkpoints=files)


def test_a_checkpoint_that_is_written_to_meanwhile_is_refused(tmp_path: Path) -> None:
    data, files, _ = trained(tmp_path)
    job = Job(METHOD, model(), data, tmp_path / "job", checkpoints=files, chunk=40)
    kept = files["step 1"].read_bytes()
    torch.save(model().state_dict(), files["step 1"])
    with pytest.raises(ValueError, match="checkpoint 'step 1' has other weights than when the job was made"):
        job.work()
    assert job.status().chunks_done == 2
    files["step 1"].write_bytes(kept)
    assert job.work().finished
