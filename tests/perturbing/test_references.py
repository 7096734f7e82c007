"""References: what is drawn for a batch, of the shapes of what it stands for."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook.perturbing.references import Baseline, References, as_references


def drawn(baseline: Baseline, x: Tensor, dims: int = 1, **options: object) -> list[Tensor]:
    td = options.pop("td", TensorDict({"x": x}, x.shape[:dims]))
    made = References(baseline, **options).of({"x": x}, {"x": dims}, td)
    return [one.replaced["x"] for one in made]


def test_numbers_rows_and_functions() -> None:
    x, row = torch.randn(2, 3, 4), torch.randn(4)
    for baseline, wanted in (
        (0.5, torch.full_like(x, 0.5)),
        (row, row.expand_as(x)),
        (x.flip(0), x.flip(0)),
        (x.flip(0).reshape(6, 4), x.flip(0)),
        (lambda rows: 2 * rows, 2 * x),
        ("mean", x.mean((0, 1)).expand_as(x)),
    ):
        (found,) = drawn(baseline, x, 2)
        torch.testing.assert_close(found, wanted)


def test_references_lie_in_memory_as_what_they_stand_for() -> None:
    for x in (
        torch.randn(3, 4),
        torch.randn(1, 4),
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    ):
        for baseline in (0.0, torch.zeros(x.shape[1:]), "mean", torch.zeros_like):
            references = References(baseline, data=TensorDict({"x": x}, x.shape[:1]))
            (one,) = references.of({"x": x}, {"x": 1}, TensorDict({"x": x}, x.shape[:1]))
            found = one.laid_out_as({"x": x})["x"]
            assert found.stride() == x.stride() and found.dtype == x.dtype
            torch.testing.assert_close(found, one.replaced["x"])


def test_a_row_for_all_is_no_copy_of_itself() -> None:
    for baseline in (0.5, torch.zeros(4)):
        (found,) = drawn(baseline, torch.randn(3, 4))
        assert found.shape == (3, 4) and found.stride(0) == 0


def test_samples_are_rows_of_the_batch_or_of_data_and_the_same_each_time() -> None:
    x, data = torch.randn(5, 4), TensorDict({"x": torch.randn(7, 4)}, [7])
    for rows, options in ((x, {}), (data["x"], {"data": data})):
        found, again = drawn("sample", x, samples=6, **options), drawn("sample", x, samples=6, **options)
        assert len(found) == 6 and all(map(torch.equal, found, again))
        assert all((one.unsqueeze(1) == rows).all(-1).any(1).all() for one in found)
        assert not all(torch.equal(one, found[0]) for one in found)
        assert not all(map(torch.equal, found, drawn("sample", x, samples=6, seed=1, **options)))


def test_entries() -> None:
    x, other = torch.randn(3, 4), torch.randn(3, 4)
    td = TensorDict({"x": x, "other": other, "baseline": {"x": 2 * other}}, [3])
    assert torch.equal(drawn("other", x, td=td)[0], other)
    assert torch.equal(drawn("baseline", x, td=td)[0], 2 * other)
    assert torch.equal(drawn(("baseline", "x"), x, td=td)[0], 2 * other)


def test_what_is_read_and_not_attributed() -> None:
    x, ids = torch.randn(3, 4), torch.randint(9, (3, 2))
    td = TensorDict({"x": x, "ids": ids}, [3])
    (one,) = References({"ids": 0}).of({"x": x}, {"x": 1}, td)
    assert not one.replaced and torch.equal(one.entries["ids"], torch.zeros_like(ids))


@pytest.mark.parametrize(
    "baseline, error, message",
    [
        (torch.zeros(5), ValueError, "does not fit"),
        ({"y": 0.0}, KeyError, "neither attributed"),
        ("unheard_of", KeyError, "nor an entry"),
    ],
)
def test_what_does_not_fit_is_named(baseline: Baseline, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        drawn(baseline, torch.randn(3, 4))


def test_data_without_the_key() -> None:
    with pytest.raises(
        KeyError, match="have no 'x', but y; for a value inside the model they hold what it is"
    ):
        drawn("mean", torch.randn(3, 4), data=TensorDict({"y": torch.ones(2)}, [2]))


def test_samples_are_of_something() -> None:
    for samples in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="how many references"):
            References("sample", samples)
    with pytest.raises(TypeError, match="a TensorDict of rows by key, got Tensor"):
        References("sample", data=torch.randn(3, 4))
    with pytest.raises(ValueError, match="drawn of data"):
        References(0.0, 2)
    with pytest.raises(ValueError, match="give baseline too"):
        as_references(None, 2)
    data = TensorDict({"x": torch.ones(2)}, [2])
    assert as_references(data, 3).data is data and as_references(None, 1) is None


def test_which_are_the_same_for_each_batch() -> None:
    constant = [0.0, torch.zeros(3), {"x": 1.0}]
    others = ["mean", "sample", "previous", ("baseline", "x"), torch.zeros_like, {"x": 1.0, "y": "mean"}]
    assert all(References(one).constant for one in constant)
    assert not any(References(one).constant for one in others)


def test_the_step_before_is_not_known_row_by_row() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="give the values of that step as entries"):
        References("previous").among(TensorDict({"x": x}, [3]))
    td = TensorDict({"x": x, "previous": {"x": 2 * x}}, [3])
    assert References("previous").among(td).steps_before == 1
