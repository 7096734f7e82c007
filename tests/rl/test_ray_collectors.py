"""On a Ray cluster, torchrl's collectors and buffers explain. These run where Ray is installed (`nox -s cluster`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("ray")
pytest.importorskip("torchrl")

import ray
from a_collector import explained_by, followed, options_of
from collected import ATTR, CHOSEN, STABLE, cartpole, explain, q_actor
from torchrl.collectors.distributed import RayCollector
from torchrl.data import LazyTensorStorage, RayReplayBuffer

import tdhook
from tdhook import LRP
from tdhook.datasets import Job
from tdhook.datasets.on_ray import launch_on_ray
from tdhook.rl import Explain

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's own, and torchrl's of Ray
]
METHOD = LRP(STABLE, target=CHOSEN)


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    path = os.pathsep.join([str(Path(tdhook.__file__).parents[1]), str(Path(__file__).parent)])
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


def collector(policy: Any, frames: int = 40, total: int = 160, **options: Any) -> RayCollector:
    small = {"num_cpus": 1, "num_gpus": 0, "memory": 256 << 20}
    return RayCollector(
        [cartpole, cartpole], policy, remote_configs=small, **options_of(frames, total), **options
    )


def buffer(**options: Any) -> RayReplayBuffer:
    return RayReplayBuffer(storage=partial(LazyTensorStorage, 100), batch_size=16, **options)


def steps(count: int = 40) -> TensorDict:
    torch.manual_seed(1)
    action = torch.nn.functional.one_hot(torch.arange(count) % 2, 2)
    return TensorDict({"observation": torch.randn(count, 4), "action": action}, [count])


def test_each_batch_is_explained_by_the_weights_of_the_moment() -> None:
    actor = q_actor()
    shares = followed(collector(explain(actor), sync=True), actor)
    assert shares == [[0.0] * i + [1.0] for i in range(4)]


def test_collectors_that_do_not_wait_know_newer_weights_by_and_by() -> None:
    actor = q_actor()
    shares = followed(collector(explain(actor), sync=False), actor)
    assert shares[0] == [1.0] and sum(map(sum, shares)) > 3
    assert any(sum(one[1:]) > 0 for one in shares)


def test_batches_are_explained_as_they_come() -> None:
    actor = q_actor()
    found = collector(actor, total=80, sync=True, postproc=Explain(METHOD, actor))
    try:
        assert [explained_by([actor], batch) for batch in found] == [[1.0], [1.0]]
    finally:
        found.shutdown()


def test_a_buffer_stores_what_explained_policies_did() -> None:
    actor, there = q_actor(), buffer()
    found = collector(explain(actor), 20, 80, sync=False, replay_buffer=there)
    try:
        for _ in found:
            pass
        assert len(there) >= 80 and explained_by([actor], there[:]) == [1.0]
    finally:
        found.shutdown()
        there.close()


@pytest.mark.parametrize("appended", [True, False])
def test_a_buffer_explains_what_is_sampled(appended: bool) -> None:
    actor = q_actor()
    explaining = Explain(METHOD, actor, snapshot=True)
    there = buffer() if appended else buffer(transform=explaining)
    try:
        if appended:
            there.append_transform(explaining)
        there.extend(steps())
        batch = there.sample()
        assert batch[ATTR].shape == (16, 4) and explained_by([actor], batch) == [1.0]
    finally:
        there.close()


def test_a_job_on_a_buffer_is_this_process_alone_or_reads_what_it_dumps(tmp_path: Path) -> None:
    actor, there = q_actor(), buffer()
    try:
        there.extend(steps())
        job = Job(METHOD, actor, there, tmp_path / "job", chunk=10)
        with pytest.raises(TypeError, match="the job cannot be sent to other processes"):
            launch_on_ray(job, 2)
        assert job.work().finished
        there.dumps(tmp_path / "dumped")
    finally:
        there.close()
    other = Job(METHOD, actor, tmp_path / "dumped", tmp_path / "other", chunk=10)
    assert launch_on_ray(other, 2).finished
    assert torch.equal(job.result().rows[ATTR], other.result().rows[ATTR])
    assert explained_by([actor], steps().update(job.result().rows)) == [1.0]
