"""Sending: a job as bytes, for other processes; rows in memory lie where all of them see them."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from importlib.util import find_spec

from tensordict import TensorDictBase

from tdhook.datasets.job import Job
from tdhook.datasets.rows import InMemory
from tdhook.extras import require

__all__ = ["Sent"]


@dataclass
class Sent:
    """A job that is sent.

    Attributes:
        data: the job, but for its rows in memory.
        shared: those, in shared memory.
    """

    data: bytes
    shared: list[TensorDictBase] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, *picklers: type[pickle.Pickler]) -> Sent:
        """A job, packed.

        Args:
            job: what is sent.
            picklers: what packs it, the first that can; by default Python's own, and cloudpickle if it is installed,
                which sends functions and classes that have no name elsewhere.

        Raises:
            TypeError: it holds something that cannot be sent; the message says what.
        """
        if not picklers:
            there = find_spec("cloudpickle") is not None
            picklers = (pickle.Pickler, *([require("cloudpickle", "launch").Pickler] if there else []))
        tried = (cls._packed(job, pickler) for pickler in picklers)
        errors: list[Exception] = []
        for found in tried:
            if isinstance(found, Sent):
                return found
            errors.append(found)
        raise TypeError(
            f"the job cannot be sent to other processes: {errors[0]}. Define what it names at the top of a module, "
            "install cloudpickle, or start the processes by torchrun, where each makes the job for itself and calls "
            "work()"
        ) from errors[0]

    @classmethod
    def _packed(cls, job: Job, pickler: type[pickle.Pickler]) -> Sent | Exception:
        buffer = io.BytesIO()
        shared: list[TensorDictBase] = []

        class Packing(pickler):  # type: ignore[valid-type,misc]
            def persistent_id(self, value: object) -> int | None:
                if not isinstance(value, InMemory) or value.td.is_memmap() or value.td.is_shared():
                    return None
                shared.append(value.td.clone().share_memory_())
                return len(shared) - 1

        try:
            Packing(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(job)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            return error
        return cls(buffer.getvalue(), shared)

    def job(self) -> Job:
        """The job."""
        shared = self.shared

        class Unpacking(pickle.Unpickler):
            def persistent_load(self, number: int) -> InMemory:
                return InMemory(shared[number])

        found: object = Unpacking(io.BytesIO(self.data)).load()
        assert isinstance(found, Job)
        return found
