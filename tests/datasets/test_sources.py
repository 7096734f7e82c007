"""Rows are read from wherever they lie, in their order."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, tensorclass
from torch import Tensor

from tdhook.datasets.rows import as_rows, chosen, rows_identity


def data(count: int = 37) -> TensorDict:
    torch.manual_seed(0)
    return TensorDict(
        {"observation": torch.randn(count, 4), "next": {"done": torch.zeros(count, 1, dtype=torch.bool)}},
        [count],
    )


@tensorclass
class Step:
    observation: Tensor
    next: TensorDict
    reward: Tensor | None = None


def steps() -> Any:
    td = data()
    return Step(td["observation"], td["next"], batch_size=[len(td)])


def saved(td: TensorDict, home: Path) -> Path:
    td.memmap(home)
    return home


def dumped(home: Path, ndim: int = 1) -> Path:
    rl = pytest.importorskip("torchrl.data")
    storage = rl.LazyMemmapStorage(1000, scratch_dir=home / "scratch", ndim=ndim)
    buffer = rl.TensorDictReplayBuffer(storage=storage, batch_size=4)
    buffer.extend(data() if ndim == 1 else data(36).reshape(4, 9))
    buffer.dumps(home / "dump")
    return home / "dump"


class Alone:
    """Gives one row at a time."""

    def __init__(self, rows: TensorDictBase) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> TensorDictBase:
        if not isinstance(i, int):
            raise TypeError("one at a time")
        return self.rows[i]


def storage_of(home: Path) -> Any:
    rl = pytest.importorskip("torchrl.data")
    buffer = rl.TensorDictReplayBuffer(storage=rl.LazyTensorStorage(1000), batch_size=4)
    buffer.extend(data())
    return buffer


SOURCES: dict[str, Callable[[Path], Any]] = {
    "in memory": lambda home: data(),
    "saved": lambda home: saved(data(), home / "td"),
    "as text": lambda home: str(saved(data(), home / "td")),
    "mapped": lambda home: data().memmap(home / "td"),
    "dumped": dumped,
    "its storage": lambda home: dumped(home) / "storage",
    "a buffer": storage_of,
    "a storage": lambda home: storage_of(home)._storage,
    "one at a time": lambda home: Alone(data()),
    "a list": lambda home: list(data().unbind(0)),
    "a tensorclass": lambda home: steps(),
    "a list of tensorclasses": lambda home: [steps()[i] for i in range(37)],
    "rows": lambda home: as_rows(data()),
}


@pytest.mark.parametrize("name", SOURCES)
def test_rows_of_every_source(name: str, tmp_path: Path) -> None:
    rows, expected = as_rows(SOURCES[name](tmp_path)), data()
    assert len(rows) == 37
    found = rows.read(5, 12)
    assert found.batch_size == (7,)
    for key in ("observation", ("next", "done")):
        assert torch.equal(found.get(key), expected[5:12].get(key))
    told = rows_identity(rows)
    assert told["rows"] == 37 and told["entries"]["observation"] == ["torch.float32", 4]  # type: ignore[index, call-overload]
    if name not in ("dumped", "its storage", "a buffer", "a storage"):  # these number their rows
        assert told == rows_identity(as_rows(expected))
    again = pickle.loads(pickle.dumps(rows))
    assert torch.equal(again.read(0, 37)["observation"], expected["observation"])


def test_rows_of_a_storage_with_two_axes(tmp_path: Path) -> None:
    rows = as_rows(dumped(tmp_path, ndim=2))
    found = rows.read(0, len(rows))
    assert found.batch_dims == 2 and found.batch_size.numel() == 36
    assert {*found["observation"].flatten().tolist()} == {*data(36)["observation"].flatten().tolist()}


def test_rows_that_are_chosen_are_read_in_stretches() -> None:
    calls: list[tuple[int, int]] = []

    class Counted:
        def __len__(self) -> int:
            return 37

        def read(self, begin: int, end: int) -> TensorDictBase:
            calls.append((begin, end))
            return data()[begin:end]

    rows = chosen(Counted(), [3, 4, 5, 9, 8, 20, 21])
    assert torch.equal(rows.read(0, 7)["observation"], data()["observation"][[3, 4, 5, 9, 8, 20, 21]])
    assert calls == [(3, 6), (9, 10), (8, 9), (20, 22)]
    assert rows.read(2, 2).batch_size == (0,)


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no saved TensorDict"):
        as_rows(tmp_path)
    with pytest.raises(TypeError, match="a source is a TensorDict, a folder of one"):
        as_rows(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a source gives TensorDicts, and this one gave int"):
        as_rows([1, 2]).read(0, 2)  # type: ignore[list-item]
    for folder in (None, tmp_path / "alone"):
        alone = TensorDict({"x": torch.zeros(3)}, [])
        with pytest.raises(ValueError, match="without a batch axis, which has no rows"):
            as_rows(alone if folder is None else saved(alone, folder))
    folder = dumped(tmp_path)
    (folder / "storage" / "storage_metadata.json").write_text('{"len": "many"}')
    with pytest.raises(ValueError, match="does not say how many rows are filled"):
        as_rows(folder)
