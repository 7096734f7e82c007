"""Errors say which rows they are of, and by which reducer, and stay of their kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from a_job import a_job, policy, steps
from tensordict import TensorDictBase
from torch import Tensor

from tdhook import LRP, Target
from tdhook.datasets import Job, Moments, TopRows
from tdhook.datasets.again import reduce_kept
from tdhook.datasets.faults import rows_named
from tdhook.datasets.reducing import By


class OfTwo(LookupError):
    """Cannot be made of a text."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class OfValues(ValueError):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


@pytest.mark.parametrize(
    "error, kind, text",
    [
        (KeyError("there is no 'x'"), KeyError, "there is no 'x'"),
        (NotImplementedError("not yet"), NotImplementedError, "not yet"),
        (AssertionError(), AssertionError, "AssertionError"),
        (OfTwo(1, 2), RuntimeError, "1 and 2"),
        (OfValues(1, 2), ValueError, "1 and 2"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), ValueError, "'utf-8' codec can't decode byte"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_stays_of_its_kind(error: Exception, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught, rows_named(16, 32, "the reducer 'top'"):
        raise error
    assert type(caught.value) is kind and caught.value.__cause__ is error
    assert str(caught.value.args[0]).startswith(f"rows 16 to 31: the reducer 'top': {text}")


def test_errors_of_the_system_are_left_alone() -> None:
    with pytest.raises(FileNotFoundError) as caught, rows_named(0, 1):
        raise FileNotFoundError(2, "there is none", "x")
    assert caught.value.filename == "x"


def odd(rows: TensorDictBase) -> Tensor:
    """Tells rows apart, but some."""
    action = rows["action"]
    if bool((rows["observation"] == 5).any()):
        raise LookupError("nobody knows")
    return action


@pytest.mark.parametrize(
    "by, kind, text",
    [
        (odd, LookupError, r"rows 32 to 47: the reducer 'mine': nobody knows"),
        ("hot", ValueError, r"rows 32 to 47: the reducer 'mine': .*: row 37 has 2 of 3"),
        ("missing", KeyError, r"rows 0 to 1: the reducer 'mine': rows are told apart by 'missing'"),
    ],
)
def test_a_reducer_says_the_rows_at_fault(by: By, kind: type[Exception], text: str, tmp_path: Path) -> None:
    data = steps(64)
    data["observation"][37] = 5.0
    data["hot"] = torch.nn.functional.one_hot(data["action"], 3)
    data["hot"][37] = torch.tensor([1, 1, 0])
    method = LRP("epsilon_plus", target=Target("action_value", "action"))
    options = {"chunk": 16, "at_once": 8}
    folder, reduce = tmp_path / "job", [Moments(by=by, name="mine")]
    with pytest.raises(kind, match=text):
        Job(method, policy(), data, folder, reduce=reduce, **options).work()  # type: ignore[arg-type]
    if by == "missing":  # it is tried on the first rows, before anything is written
        assert not folder.exists()
    else:
        assert Job(method, policy(), data, folder, reduce=reduce, **options).status().chunks_done == 3  # type: ignore[arg-type]
    kept = Job(method, policy(), data, tmp_path / "kept", **options)  # type: ignore[arg-type]
    kept.work()
    with pytest.raises(kind, match=text.replace("32 to 47:", "0 to 63:").replace("0 to 1:", "0 to 63:")):
        reduce_kept(kept.result(), [Moments(by=by, name="mine")], data)


def test_a_score_says_the_rows_at_fault(tmp_path: Path) -> None:
    job = a_job(tmp_path / "job")
    job.work()
    for score, kind, text in (
        (7, IndexError, "rows 0 to 599: the reducer 'toprows': score=7, and there are 4 features"),
        (Tensor.sum, ValueError, "rows 0 to 599: the reducer 'toprows': the score gives .* for 600 rows"),
    ):
        with pytest.raises(kind, match=text):
            reduce_kept(job.result(), [TopRows(2, score=score)])
