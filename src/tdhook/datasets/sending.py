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
    def of(cls, job: Job) -> Sent:
        """A job, packed.

        Raises:
            TypeError: it holds something that cannot be sent; the message names it.
        """
        plain = cls._packed(job, pickle.Pickler)
        if not isinstance(plain, Exception):
            return plain
        if find_spec("cloudpickle") is not None:  # sends functions and classes that have no name elsewhere
            by_value = cls._packed(job, require("cloudpickle", "launch").Pickler)
            if not isinstance(by_value, Exception):
                return by_value
        raise TypeError(
            f"the job cannot be sent to other processes: {plain}. Define what it names at the top of a module, install "
            "cloudpickle, or start the processes by torchrun, where each makes the job for itself and calls work()"
        ) from plain

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
