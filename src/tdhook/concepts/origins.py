"""Origins: of which weights and of which data it is that rows were counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn

from tdhook.datasets.identity import module_identity
from tdhook.datasets.result import Result
from tdhook.datasets.rows import Rows, rows_identity

__all__ = ["Origin"]


@dataclass(frozen=True)
class Origin:
    """Where what was counted comes from, as far as it is known.

    Attributes:
        weights: digest of the weights of the policy.
        source: digest of the data.
    """

    weights: str | None = None
    source: str | None = None

    @staticmethod
    def of(policy: nn.Module, rows: Rows) -> Origin:
        """That of a policy and its data."""
        return Origin(str(module_identity(policy)["weights"]), str(rows_identity(rows)["digest"]))

    @staticmethod
    def of_job(result: Result) -> Origin:
        """That of what a job has made; of its checkpoints the weights are not told."""
        told = result.stored.folder.told()
        model, source = told["model"], told["source"]
        assert isinstance(model, dict) and isinstance(source, dict)
        return Origin(None if result.checkpoints else str(model["weights"]), str(source["digest"]))

    @staticmethod
    def from_data(told: Mapping[str, str | None]) -> Origin:
        """As :meth:`as_data` gave it."""
        return Origin(told["weights"], told["source"])

    def as_data(self) -> dict[str, str | None]:
        """As plain data."""
        return asdict(self)

    def followed_by(self, other: Origin, again: int = 0) -> Origin:
        """That of more rows.

        Args:
            other: of these.
            again: how many of them have numbers of rows that were counted.

        Raises:
            ValueError: they have other weights; or rows of these numbers were others, as far as is known.
        """
        if None not in (self.weights, other.weights) and self.weights != other.weights:
            raise ValueError(
                "rows were counted with other weights of the policy: what units respond to is told of one, and others "
                "have ReferenceSamples of their own"
            )
        if again and self.source != other.source:
            raise ValueError(
                f"rows of {again} of these numbers were counted, and not known to be these: say which rows are new, "
                "rows=slice(...), or count batches with numbers of their own, update(td, rows)"
            )
        return Origin(other.weights or self.weights, other.source or self.source)
