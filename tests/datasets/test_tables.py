"""Kept rows as Parquet and Arrow, read by polars and duckdb."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import pyarrow.parquet as pq

from tdhook import LRP, Target
from tdhook.datasets import Job, Result, tables
from tdhook.datasets.tables import arrow_batches, arrow_of, write_parquet

COUNT = 50


def source() -> TensorDict:
    torch.manual_seed(1)
    return TensorDict(
        {
            "observation": torch.randn(COUNT, 4),
            "action": torch.arange(COUNT) % 3,
            "next": {"done": (torch.arange(COUNT) % 10 == 9)[:, None]},
        },
        [COUNT],
    )


def made(out: Path, keep: object = "all") -> Result:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    policy = TensorDictModule(net, ["observation"], ["action_value"])
    job = Job(
        LRP("epsilon", target=Target("action_value", "action")), policy, source(), out, chunk=16, keep=keep
    )
    job.work()
    return job.result()


@pytest.mark.parametrize("keep", ["all", "compressed", torch.bfloat16])
def test_parquet_has_each_row(keep: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_BYTES", 16 * 7)
    result = made(tmp_path / "job", keep)
    path = write_parquet(result, tmp_path / "rows.parquet", source(), keys=["action", ("next", "done")])
    found = pq.read_table(path)
    assert found.column_names == ["row", "action", "attr.observation", "next.done"]
    assert found["row"].to_pylist() == list(range(COUNT))
    wanted = result.read(0, COUNT)["attr", "observation"].float()
    assert torch.equal(torch.tensor(found["attr.observation"].to_pylist()), wanted)
    assert found["next.done"].to_pylist() == source()["next", "done"][:, 0].tolist()


def test_polars_and_duckdb_read_it(tmp_path: Path) -> None:
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    result = made(tmp_path / "job")
    path = write_parquet(result, tmp_path / "rows.parquet", source(), keys=["action"])
    first = result.rows["attr", "observation"][:, 0].double()
    wanted = [first[source()["action"] == action].mean().item() for action in range(3)]
    frame = polars.read_parquet(path).group_by("action").agg(polars.col("attr.observation").arr.get(0).mean())
    assert frame.sort("action")["attr.observation"].to_list() == pytest.approx(wanted, rel=1e-5)
    query = 'select action, avg("attr.observation"[1]) from read_parquet(?) group by action order by action'
    assert [mean for _, mean in duckdb.execute(query, [str(path)]).fetchall()] == pytest.approx(
        wanted, rel=1e-5
    )


def test_pictures_are_nested_lists() -> None:
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert arrow_of(TensorDict({"pixels": x}, [2]))["pixels"].to_pylist() == x.tolist()


def test_mistakes_are_told(tmp_path: Path) -> None:
    result = made(tmp_path / "job")
    with pytest.raises(ValueError, match="keys= are entries of the source: give it"):
        write_parquet(result, tmp_path / "rows.parquet", keys=["action"])
    with pytest.raises(KeyError, match="the source has no 'colour'"):
        write_parquet(result, tmp_path / "rows.parquet", source(), keys=["colour"])
    other = source()
    other["observation"] += 1
    with pytest.raises(ValueError, match="differs in digest"):
        next(arrow_batches(result, other, keys=["action"]))
    assert not (tmp_path / "rows.parquet").exists()
    twice = TensorDict({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, [1])
    with pytest.raises(ValueError, match=r"two entries are called a.b as columns"):
        arrow_of(twice)
