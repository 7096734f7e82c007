"""Ray: a job worked on by actors of a cluster, and rows of Ray Data explained as they pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from tdhook.contexts.attribution import Attribution
from tdhook.contexts.recorded import Recorded
from tdhook.datasets.job import Job
from tdhook.datasets.result import Status
from tdhook.datasets.sending import Sent
from tdhook.datasets.units import Place
from tdhook.extras import require
from tdhook.keys import parts_of
from tdhook.models.model import InKeys

__all__ = ["ExplainBatch", "launch_on_ray"]


def launch_on_ray(
    job: Job,
    workers: int,
    *,
    on_progress: Callable[[Status], object] | None = None,
    every: float = 1.0,
    **options: object,
) -> Status:
    """Have actors of a Ray cluster work on a job, and wait until all is done.

    The job folder, and a source that is a folder, are on a file system that all nodes see under the same name.

    Args:
        job: what is explained.
        workers: how many actors.
        on_progress: called with what there is now, again and again, and once at the end.
        every: seconds between two such calls.
        **options: of each actor, as ``num_cpus``, ``resources``, ``scheduling_strategy``; by default so many CPUs as
            the job takes threads.

    Returns:
        What there is now.

    Raises:
        RuntimeError: actors have died, and not all is done.
        Exception: what an actor raised.
    """
    ray = require("ray", "launch_on_ray")
    sent = ray.put(Sent.of(job, ray.cloudpickle.Pickler))
    actor = ray.remote(_Actor).options(**{"num_cpus": job.threads, **options})
    team = [actor.remote() for _ in range(workers)]
    waiting = [one.work.remote(sent, Place(i, workers)) for i, one in enumerate(team)]
    errors: list[Exception] = []
    try:
        while waiting:
            ended, waiting = ray.wait(waiting, num_returns=1, timeout=every)
            for one in ended:
                try:
                    ray.get(one)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                except ray.exceptions.RayActorError as error:
                    errors.append(error)
            if on_progress is not None:
                on_progress(job.status())
    finally:
        for one in team:
            ray.kill(one)
    status = job.status()
    if not status.finished:
        raise RuntimeError(
            f"{len(errors)} of {workers} actors have died, and {status.chunks - status.chunks_done} chunks are left. "
            "What is done stays done: begin again, and the work goes on"
        ) from (errors[0] if errors else None)
    job.folder.finish_rows()
    return status


class _Actor:
    """A worker of a cluster."""

    def work(self, sent: Sent, place: Place) -> None:
        sent.job().work(place=place)


class ExplainBatch:
    """Explains batches of Ray Data: ``ds.map_batches(ExplainBatch, fn_constructor_args=(method, policy), ...)``.

    Columns are entries of a TensorDict; those of nested entries have the parts of their key with dots between. Rows of
    a stream have no number and no order: what looks at other rows (``baseline="previous"``, means of the data set) is
    for :class:`~tdhook.datasets.job.Job`.

    Args:
        method: what is explained and how.
        policy: what is explained.
        in_keys: as in ``method.wrap``.
        at_once: how many rows are explained in one pass; by default by their size.
    """

    def __init__(
        self,
        method: Attribution,
        policy: TensorDictModuleBase,
        in_keys: InKeys | None = None,
        at_once: int | None = None,
    ) -> None:
        policy = policy.eval()
        self._recorded = Recorded(
            method, lambda given: given.wrap(policy, in_keys), at_once=at_once, mask_key=None
        )

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch with what was found beside it, ``[rows, ...]`` by column."""
        rows = len(next(iter(batch.values())))
        td = TensorDict({}, [rows])
        for name, value in batch.items():
            td.set(tuple(name.split(".")), torch.as_tensor(np.ascontiguousarray(value)))
        found = self._recorded.entries(td)
        return {**batch, **{".".join(parts_of(key)): value.numpy() for key, value in found.items()}}
