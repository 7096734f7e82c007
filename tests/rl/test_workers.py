"""An explained policy acts in processes of its own."""

from __future__ import annotations

import copy
import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from collected import ATTR, cartpole, close, collecting, explain, q_actor, recomputed, within
from tensordict import TensorDictBase
from torch import nn

pytest.importorskip("torchrl")

from torchrl.collectors import MultiAsyncCollector, MultiSyncCollector


def trained_a_bit(actor: nn.Module, batch: TensorDictBase, optimiser: torch.optim.Optimizer) -> None:
    for _ in range(3):
        found = actor(batch.select("observation").reshape(-1))["action_value"]
        ((found * batch["action"].reshape(-1, 2)).sum(-1) - 5.0).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.slow
def test_two_workers_explain_with_the_weights_of_the_moment() -> None:
    actor = q_actor(300, 300)  # large enough for modified weights to be kept from call to call
    optimiser = torch.optim.Adam(actor.parameters(), lr=1e-3)
    frames = updates = 0
    with within(600):
        collector = MultiSyncCollector(
            [cartpole, cartpole], explain(actor), **collecting(1_000, 10_000, cat_results="stack")
        )
        try:
            for batch in collector:
                frames += batch.numel()
                assert batch.shape == (2, 500)
                assert bool(close(batch[ATTR], recomputed(actor, batch)).all())
                trained_a_bit(actor, batch, optimiser)
                assert not close(
                    batch[ATTR], recomputed(actor, batch)
                ).all()  # older weights would be noticed
                collector.update_policy_weights_()
                updates += 1
        finally:
            collector.shutdown()
    assert (frames, updates) == (10_000, 10)


@pytest.mark.slow
def test_two_workers_that_do_not_wait_for_each_other() -> None:
    actor = q_actor(300, 300)
    optimiser = torch.optim.Adam(actor.parameters(), lr=1e-3)
    versions, found = [copy.deepcopy(actor)], []
    with within(300):
        collector = MultiAsyncCollector([cartpole, cartpole], explain(actor), **collecting(200, 1_600))
        try:
            for batch in collector:
                known = torch.stack([close(batch[ATTR], recomputed(version, batch)) for version in versions])
                found += known.any(0).tolist()
                trained_a_bit(actor, batch, optimiser)
                versions.append(copy.deepcopy(actor))
                collector.update_policy_weights_()
        finally:
            collector.shutdown()
    assert bool(known[1:].any())  # those that were trained did arrive
    # One after another, while the workers go on acting: some steps see old ones and new ones.
    assert sum(found) > len(found) / 2


def killed(policy: Any) -> tuple[Exception, list[int]]:
    """What is raised where a worker is killed on the way, and the processes that are left."""
    collector = MultiSyncCollector([cartpole, cartpole], policy, **collecting(40, 4_000, cat_results="stack"))
    workers = [process.pid for process in collector.procs]
    raised: Exception | None = None
    try:
        for i, _ in enumerate(collector):
            if i == 1:
                os.kill(workers[0], signal.SIGKILL)
    except Exception as error:  # whichever it is
        raised = error
    collector.shutdown(raise_on_error=False)
    until = time.monotonic() + 60
    while (left := [pid for pid in workers if runs(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert raised is not None
    return raised, left


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_a_worker_that_is_killed_gives_torchrls_own_error_and_leaves_nothing_behind() -> None:
    with within(300):
        error, left = killed(explain(q_actor()))
    assert not left
    # Of a machine that is busy torchrl makes the second: it closes the other worker before that has ended.
    assert "At least one process failed: worker 0" in str(error) or "Cannot close a process" in str(error)
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    assert any("torchrl" in name for name in frames)
    assert not any("tdhook/src" in name or "/src/tdhook/" in name for name in frames)
