"""On a Ray cluster a job comes out as elsewhere. These run where Ray is installed (`nox -s cluster` installs it)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from a_job import a_job, policy, same, steps

import tdhook
from tdhook import LRP, Target
from tdhook.datasets.on_ray import ExplainBatch, launch_on_ray
from tdhook.datasets.result import Status

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    path = os.pathsep.join([str(Path(tdhook.__file__).parents[1]), str(Path(__file__).parent)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.mark.parametrize("memory", [True, False])
def test_actors_write_the_same_bytes(memory: bool, tmp_path: Path) -> None:
    source: Any = steps()
    if not memory:
        source.memmap(tmp_path / "source")
        source = tmp_path / "source"
    seen: list[Status] = []
    job = a_job(tmp_path / "job", source)
    assert launch_on_ray(job, 2, on_progress=seen.append, every=0.1).finished
    assert seen[-1].finished and job.verify(3).ok
    assert a_job(tmp_path / "whole").work().finished
    same(tmp_path / "job", tmp_path / "whole")


def test_an_error_of_an_actor_comes_back(tmp_path: Path) -> None:
    data = steps(100)
    data["observation"][40] = torch.nan
    job = a_job(tmp_path / "job", data)
    with pytest.raises(ValueError, match="rows 32 to 47: "):
        launch_on_ray(job, 2)
    assert job.status().chunks_done >= 1


def test_an_actor_that_dies_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job(tmp_path / "job")
    killed: list[int] = []

    def kill_one(status: Status) -> None:
        names = [path.stem for path in (tmp_path / "job" / "workers").iterdir()]
        if status.chunks_done and not killed:
            killed.append(int(names[0].split("-")[-2]))
            os.kill(killed[0], 9)

    assert launch_on_ray(job, 2, on_progress=kill_one, every=0.01).finished
    assert killed
    assert a_job(tmp_path / "whole").work().finished
    same(tmp_path / "job", tmp_path / "whole")


@pytest.mark.parametrize("at_once", [None, 7])
def test_batches_of_ray_data(at_once: int | None) -> None:
    method = LRP("epsilon_plus", target=Target("action_value", "action"))
    td = steps(100)
    pytest.importorskip("ray.data")
    rows = [
        {"observation": td["observation"][i].numpy(), "action": td["action"][i].item(), "row": i}
        for i in range(100)
    ]
    data = ray.data.from_items(rows)
    data = data.map_batches(
        ExplainBatch, fn_constructor_args=(method, policy(), None, at_once), batch_size=32, concurrency=1
    )
    found = sorted(data.take_all(), key=lambda row: row["row"])
    relevance = np.stack([row["attr.observation"] for row in found])
    expected = method.wrap(policy())(td)["attr", "observation"]
    np.testing.assert_allclose(relevance, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert {"observation", "action", "row"} < {*found[0]}
