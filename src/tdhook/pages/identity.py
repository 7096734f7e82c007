"""What a job is, in words, of what its manifest says."""

from __future__ import annotations

from collections.abc import Mapping

from tdhook.datasets.identity import Plain
from tdhook.datasets.stored import Stored

__all__ = ["facts_of", "identity_of"]


def facts_of(stored: Stored) -> dict[str, object]:
    """What was explained, and how."""
    told = stored.folder.told()
    return {"method": _class(told.get("method")), "seed": told.get("seed"), "dtype": _dtypes(stored)}


def identity_of(stored: Stored) -> dict[str, object]:
    """What tells the job from others: digests of weights and source, and versions."""
    told = stored.folder.told()
    model, source, versions = (_table(told.get(name)) for name in ("model", "source", "versions"))
    return {
        "weights": model.get("weights"),
        "model": _class(told.get("model")),
        "source": source.get("digest"),
        "rows": f"{stored.units.rows:,} in {stored.units.chunks:,} chunks of {stored.units.chunk:,}",
        **({"checkpoints": ", ".join(stored.checkpoints)} if stored.checkpoints else {}),
        "kept": _kept(stored),
        "threads": told.get("threads"),
        "tdhook": told.get("tdhook"),
        **versions,
    }


def _table(value: Plain) -> Mapping[str, Plain]:
    return value if isinstance(value, dict) else {}


def _class(value: Plain) -> str:
    return str(_table(value).get("class", "")).rpartition(".")[2]


def _dtypes(stored: Stored) -> str:
    kinds = {str(dtype).removeprefix("torch.") for _, dtype in stored.layout.entries.values()}
    return ", ".join(sorted(kinds)) or "float32"


def _kept(stored: Stored) -> str:
    if not stored.keeps:
        return "no rows"
    return "rows, in compressed blocks" if stored.compressed else "rows"
