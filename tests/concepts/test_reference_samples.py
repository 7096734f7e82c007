"""What units respond to is the same, byte by byte, however data are cut, interrupted, spread and merged."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from responding import LAYER, ROWS, method, policy, steps
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.modules import GRUModule, set_recurrent_mode

from tdhook import LRP, Target, preset
from tdhook.concepts import ReferenceSamples
from tdhook.datasets import Place


def samples(**options: Any) -> ReferenceSamples:
    return ReferenceSamples(method(), LAYER, **{"axis": 1, "top": 5, "groups": "action", **options})


def same(one: ReferenceSamples, other: ReferenceSamples) -> None:
    """Every byte is the same."""
    ours, theirs = one.state, other.state
    keys = set(ours.keys(True, True))
    assert keys == set(theirs.keys(True, True))
    assert [key for key in keys if not torch.equal(ours.get(key), theirs.get(key))] == []


class Interrupted(Exception):
    """The work was interrupted."""


class Breaks(nn.Module):
    """Makes rows ready so many times, and then breaks."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, rows: TensorDictBase) -> TensorDictBase:
        self.times -= 1
        if self.times < 0:
            raise Interrupted
        return rows


def test_relevance_is_that_of_the_layer_summed_over_places() -> None:
    data, net = steps(), policy()
    found = samples(against=True).fold(net, data).found
    explained = LRP("epsilon_plus", target=Target("action_value", "action"), input_modules=[LAYER]).wrap(net)
    relevance = explained(data.clone())["attr", LAYER].double()
    amounts = relevance.sum((-1, -2))
    assert found.groups == [0, 1, 2] and found.units == 6 and found.places == (4, 4)
    for group in found.groups:
        mine = data["action"] == group
        torch.testing.assert_close(found.mean(group), amounts[mine].mean(0), rtol=1e-5, atol=1e-6)
        for unit in range(6):
            best = found.best(unit, group)
            assert (
                best["row"].tolist()
                == amounts[:, unit].masked_fill(~mine, -torch.inf).topk(5).indices.tolist()
            )
            torch.testing.assert_close(best["amount"], amounts[best["row"], unit], rtol=1e-5, atol=1e-6)
            assert torch.equal(best["note", "step_count"], (best["row"] % 50).double())
            assert torch.equal(
                best["note", "next", "reward"], data["next", "reward"][best["row"], 0].double()
            )
            places = relevance[best["row"], unit].flatten(1).argmax(-1)
            assert torch.equal(best["place"], torch.stack([places // 4, places % 4], -1))
            worst = found.best(unit, group, against=True)
            lowest = amounts[:, unit].masked_fill(~mine, torch.inf).topk(5, largest=False)
            assert worst["row"].tolist() == lowest.indices.tolist()


def test_values_are_those_of_a_forward_pass() -> None:
    data, net = steps(), policy()
    values = net.module[:3](data["pixels"]).detach().double()
    for pooled, amounts in (("sum", values.sum((-1, -2))), ("max", values.amax((-1, -2)))):
        found = samples(by="value", pooled=pooled, groups=None).fold(net, data).found
        for unit in range(6):
            assert found.best(unit)["row"].tolist() == amounts[:, unit].topk(5).indices.tolist()


@pytest.mark.parametrize("by", ["relevance", "value"])
def test_cut_into_parts_interrupted_merged_and_spread_it_is_the_same(tmp_path: Path, by: str) -> None:
    data, net = steps(), policy()
    whole = samples(by=by).fold(net, data, at_once=64)
    halves = [samples(by=by).fold(net, data, rows, at_once=64) for rows in (slice(512, None), range(512))]
    same(halves[0].merge(halves[1]), whole)
    broken = samples(by=by)
    with pytest.raises(Interrupted):
        broken.fold(net, data, at_once=64, prepare=Breaks(3))
    assert 0 < int(broken.seen.diff(dim=-1).sum()) < ROWS
    broken.state.memmap(tmp_path / "state")
    again = samples(by=by).load(TensorDict.load_memmap(tmp_path / "state"))
    same(again.fold(net, data, at_once=64), whole)
    of_dict = samples(by=by)
    state = TensorDict({}, [])
    state.load_state_dict(broken.state.state_dict(), strict=False)
    same(of_dict.load(state).fold(net, data, at_once=64), whole)
    explained, batches = whole.wrap(net), samples(by=by)
    for rows in reversed(torch.arange(ROWS).split(64)):
        batches.update(explained(data[rows].clone()), rows)
    found, expected = batches.state.exclude("makeup"), whole.state.exclude("makeup")  # weights are not known
    assert bool((found == expected).all())


def test_what_was_counted_with_other_weights_or_of_other_data_is_told(tmp_path: Path) -> None:
    data, net, other = steps(40), policy(), steps(60, seed=3)
    counted = samples().fold(net, data)
    with pytest.raises(ValueError, match="rows were counted with other weights of the policy"):
        counted.fold(policy(1), data)
    with pytest.raises(ValueError, match="rows were counted with other weights of the policy"):
        counted.merge(samples().fold(policy(1), steps(90), range(80, 90)))
    with pytest.raises(
        ValueError, match="rows of 40 of these numbers were counted, and not known to be these"
    ):
        counted.fold(net, other)
    samples().load(counted.state).fold(net, data)
    with pytest.raises(
        ValueError, match="rows of 40 of these numbers were counted, and not known to be these"
    ):
        samples().load(counted.state).fold(net, other)
    assert counted.fold(net, other, slice(40, None)).seen.tolist() == [[0, 60]]
    job = samples().job(policy(1), steps(90), tmp_path / "job")
    job.work()
    with pytest.raises(ValueError, match="rows were counted with other weights of the policy"):
        samples().fold(net, steps(99), range(90, 99)).take(job.result())


def test_a_job_with_several_workers_that_die_is_the_same(tmp_path: Path) -> None:
    data, net = steps(), policy()
    whole = samples().fold(net, data, piece=64, at_once=32)
    options = {"chunk": 64, "at_once": 32}
    job = samples().job(net, data, tmp_path / "job", **options)
    job.work(until=lambda: len(job.folder.all_done()) >= 3, place=Place(1, 3))
    again = samples().job(net, data, tmp_path / "job", **options)
    partial = samples().take(again.result(partial=True))
    assert 0 < int(partial.seen.diff(dim=-1).sum()) < ROWS
    assert again.work(place=Place(0, 3)).finished
    same(samples().take(again.result()), whole)
    with pytest.raises(ValueError, match=r"rows \d+ to \d+ were counted before"):
        partial.take(again.result())
    with pytest.raises(ValueError, match="the job counted otherwise, which differs in count: 3 and not 5"):
        samples(top=3).take(again.result())
    some = samples().job(net, data, tmp_path / "some", rows=slice(64, 96))
    some.work()
    with pytest.raises(
        ValueError, match="numbers these from 0, so that rows of the source would be called otherwise"
    ):
        samples().take(some.result())


def sources(data: TensorDict, tmp_path: Path) -> Iterable[object]:
    yield data.clone().memmap(tmp_path / "saved")
    yield tmp_path / "saved"
    for storage in (
        LazyTensorStorage(ROWS + 9),
        LazyMemmapStorage(ROWS + 9, scratch_dir=tmp_path / "buffer"),
    ):
        buffer = ReplayBuffer(storage=storage, batch_size=4)
        buffer.extend(data)
        yield buffer


def test_memory_mapped_data_and_replay_buffers(tmp_path: Path) -> None:
    data, net = steps(), policy()
    whole = samples(notes=["step_count"]).fold(net, data)
    for source in sources(data, tmp_path):
        same(samples(notes=["step_count"]).fold(net, source), whole)  # type: ignore[arg-type]


def test_batches_of_any_shape() -> None:
    data, net = steps(60), policy()
    explained = samples(groups=None).wrap(net)
    flat = samples(groups=None).update(explained(data.clone())).found
    shaped = samples(groups=None).update(explained(data.reshape(6, 10).clone())).found
    one = samples(groups=None).update(explained(data[7].clone())).found
    for unit in range(6):
        ours, theirs = flat.best(unit), shaped.best(unit)
        assert torch.equal(ours["row"], theirs["row"] * 10 + theirs["step"])
        torch.testing.assert_close(ours["amount"], theirs["amount"], rtol=1e-5, atol=1e-6)
        assert one.best(unit)["row"].tolist() == [0]


def test_rows_go_on_where_they_were_and_are_counted_once() -> None:
    data, net = steps(40), policy()
    counted = samples()
    explained = counted.wrap(net)
    counted.update(explained(data[:10].clone())).update(explained(data[10:30].clone()))
    assert counted.seen.tolist() == [[0, 30]]
    before = counted.state
    with pytest.raises(ValueError, match="rows 29 to 29 were counted before: each is counted once"):
        counted.update(explained(data[28:30].clone()), [35, 29])
    with pytest.raises(ValueError, match="row 35 is there twice: a row is counted once"):
        counted.update(explained(data[28:30].clone()), [35, 35])
    with pytest.raises(ValueError, match=r"there are 2 rows, and rows= are 3 numbers of torch\.int64"):
        counted.update(explained(data[28:30].clone()), [1, 2, 3])
    assert (counted.state == before).all()
    with pytest.raises(ValueError, match="rows 0 to 29 were counted before"):
        counted.merge(counted)
    other = samples().merge(counted)
    with pytest.raises(
        ValueError, match="rows of 30 of these numbers were counted, and not known to be these"
    ):
        other.fold(net, data)
    assert other.fold(net, data, slice(30, None)).seen.tolist() == [[0, 40]]


def test_values_inside_a_sequential_are_layers_too() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(5, 7), nn.Linear(7, 3)
    net = TensorDictSequential(
        TensorDictModule(first, ["x"], ["hidden"]), TensorDictModule(second, ["hidden"], ["q"])
    )
    data = TensorDict({"x": torch.randn(30, 5)}, [30])
    found = ReferenceSamples(LRP("epsilon", target=Target("q", 1)), "hidden", top=3).fold(net, data).found
    amounts = first(data["x"]) * second.weight[1]
    assert [found.best(unit)["row"].tolist() for unit in range(7)] == amounts.topk(3, 0).indices.T.tolist()


class Twice(nn.Module):
    """Calls one layer two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).relu()).relu())


def test_calls_of_a_layer_are_told_apart() -> None:
    torch.manual_seed(0)
    net = Twice()
    data = TensorDict({"input": torch.randn(30, 5)}, [30])
    first = net.layer(data["input"])
    values = {"layer:0": first, "layer:1": net.layer(first.relu())}
    wrap = LRP("epsilon", target=Target("output", 1))
    for layer, value in values.items():
        counted = ReferenceSamples(wrap, layer, top=3, by="value").fold(net, data)
        assert [counted.found.best(unit)["row"].tolist() for unit in range(5)] == value.topk(
            3, 0
        ).indices.T.tolist()
        counted = ReferenceSamples(wrap, layer, top=3).fold(net, data)
        other = ReferenceSamples(wrap, layer, top=3)
        assert torch.equal(other.update(other.wrap(net)(data.clone())).found.mean(), counted.found.mean())
        frames = counted.frames(net, data, 2)
        torch.testing.assert_close(frames["attr", "input"].double().sum(-1).sign(), frames["amount"].sign())
        assert frames["field", "input"].tolist() == [[[0], [5]]] * 3
    with pytest.raises(
        ValueError, match="the layer 'layer' was called several times: say which call, 'layer:0' is"
    ):
        ReferenceSamples(wrap, "layer").fold(net, data)


def test_what_does_not_fit_is_refused() -> None:
    data, net = steps(20), policy()
    counted = samples().fold(net, data)
    with pytest.raises(
        ValueError, match=r"these samples count otherwise, which differs in units\.count: 4 and not 5"
    ):
        samples(top=4).load(counted.state)
    with pytest.raises(ValueError, match="these samples count otherwise, which differs in by"):
        samples().merge(samples(by="value"))
    with pytest.raises(
        KeyError, match=r"the batch has no relevance of '2': explain it by samples\.wrap\(policy\)"
    ):
        samples().update(net(data.clone()))
    with pytest.raises(RuntimeError, match="no rows were counted yet"):
        samples().found  # noqa: B018
    with pytest.raises(ValueError, match="rows= is one stretch of rows, and this one has steps of 2"):
        samples().fold(net, data, slice(0, 20, 2))
    with pytest.raises(ValueError, match="by='size' is neither 'relevance' nor 'value'"):
        samples(by="size")
    with pytest.raises(ValueError, match="at least one step is listed, got top=0"):
        samples(top=0)
    several = ReferenceSamples(LRP("epsilon", target=Target("action_value", "all")), LAYER, axis=1)
    with pytest.raises(ValueError, match="relevance of '2' is that of 3 outputs, each explained for itself"):
        several.fold(net, data)


def test_what_is_asked_of_what_was_found() -> None:
    found = samples().fold(policy(), steps()).found
    assert found.count.sum() == ROWS
    torch.testing.assert_close(found.mean(), (found.told["mean"] * found.count.unsqueeze(-1)).sum(0) / ROWS)
    assert found.ranked(1)[0] == found.mean(1).argmax() and bool(
        (found.absolute() >= found.mean().abs()).all()
    )
    in_any, in_each = found.best(2), [found.best(2, group) for group in found.groups]
    amounts = torch.cat([one["amount"] for one in in_each])
    assert torch.equal(in_any["amount"], amounts.sort(descending=True).values[:5])
    assert in_any["group"].tolist() == steps()["action"][in_any["row"]].tolist()
    assert len(found.best(2, count=2)) == 2
    rows = found.best(2)["row"].tolist()
    kept: list[int] = []
    for row in rows:
        if all(abs(row - other) >= 90 for other in kept):
            kept.append(row)
    assert 1 < len(kept) < len(rows) and found.best(2, apart=90)["row"].tolist() == kept
    assert found.best(2, apart=90, count=1)["row"].tolist() == kept[:1]
    with pytest.raises(IndexError, match="there is no unit 6: the layer has 6"):
        found.best(6)
    with pytest.raises(ValueError, match="there is no group 5: there are 0, 1, 2"):
        found.best(0, 5)
    with pytest.raises(ValueError, match="steps against were not listed: make the samples with against=True"):
        found.best(0, against=True)


@pytest.mark.slow
def test_a_hundred_thousand_frames(tmp_path: Path) -> None:
    """Interrupted and resumed, in shards that are merged, by a job: the same bytes, and no more memory than for few."""
    count, net = 100_000, policy()
    pixels, drift = torch.randn(1000, 2, 7, 7), torch.arange(count) / count
    data = TensorDict(
        {"pixels": pixels.repeat(count // 1000, 1, 1, 1), "action": torch.arange(count) % 3}, [count]
    )
    data["pixels"] += drift[:, None, None, None]
    data.memmap(tmp_path / "data")
    data = TensorDict.load_memmap(tmp_path / "data")
    whole = samples(top=40).fold(net, data, range(10_000), at_once=256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole.fold(net, data, at_once=256)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    )  # kilobytes; the data are 39 MB
    assert whole.state.bytes() < 1_000_000
    resumed = samples(top=40)
    for times in (7, 31, 100):
        with pytest.raises(Interrupted):
            resumed.fold(net, data, at_once=256, prepare=Breaks(times))
        resumed = samples(top=40).load(resumed.state)
    same(resumed.fold(net, data, at_once=256), whole)
    shards = [
        samples(top=40).fold(net, data, range(i * 25_600, min((i + 1) * 25_600, count)), at_once=256)
        for i in range(4)
    ]
    merged = shards[2]
    for i in (0, 3, 1):
        merged.merge(shards[i])
    same(merged, whole)
    _by_a_job(tmp_path, net, whole, count)


def _by_a_job(tmp_path: Path, net: nn.Module, whole: ReferenceSamples, count: int) -> None:
    """By four workers, three of which stop in the midst of it, each begun where the last one left."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options: dict[str, Any] = {"chunk": 5120, "at_once": 256}
    for worker, stops in ((2, 3), (0, 8), (3, 14)):
        job = samples(top=40).job(net, tmp_path / "data", tmp_path / "job", **options)
        told = job.work(
            until=lambda job=job, stops=stops: len(job.folder.all_done()) >= stops, place=Place(worker, 4)
        )
        assert not told.finished
        partial = samples(top=40).take(job.result(partial=True))
        assert int(partial.seen.diff(dim=-1).sum()) >= stops * 5120 - 5120 and len(partial.seen) >= 1
    job = samples(top=40).job(net, tmp_path / "data", tmp_path / "job", **options)
    assert job.work(place=Place(1, 4)).finished
    same(samples(top=40).take(job.result()), whole)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_steps_of_a_recurrent_policy_without_its_padding() -> None:
    torch.manual_seed(0)
    gru = GRUModule(4, 6, in_keys=["observation", "state"], out_keys=["hidden", ("next", "state")])
    head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    net = TensorDictSequential(gru, TensorDictModule(head, ["hidden"], ["action_value"]))
    mask = torch.ones(12, 7, dtype=torch.bool)
    mask[3, 4:] = False
    data = TensorDict(
        {
            "observation": torch.randn(12, 7, 4),
            "state": torch.zeros(12, 7, 1, 6),
            "action": torch.randint(2, (12, 7)),
            "is_init": torch.arange(7)[None, :, None].expand(12, 7, 1) == 0,
            "collector": {"mask": mask},
        },
        [12, 7],
    )
    how = LRP(preset("lstm_lrp", epsilon=1e-9), target=Target("action_value", "action"))
    counted = ReferenceSamples(how, "1.module.1", top=81, groups="action").fold(net, data, trajectories=True)
    assert counted.found.count.tolist() == [int((data["action"][mask] == group).sum()) for group in (0, 1)]
    with set_recurrent_mode("recurrent"):
        hidden = net(data.clone())["hidden"]
    amounts = head[:2](hidden) * head[2].weight[data["action"]]
    for unit, group in itertools.product(range(5), (0, 1)):
        best = counted.found.best(unit, group)
        assert len(best) == counted.found.count[group] and bool(mask[best["row"], best["step"]].all())
        found = amounts[best["row"], best["step"], unit].double()
        torch.testing.assert_close(best["amount"], found, rtol=1e-3, atol=1e-6)
