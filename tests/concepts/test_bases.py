"""Bases: coordinates in given components, and components that are found."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tolerances import assert_close
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.concepts import Basis, NonNegativeBasis, Spliced, non_negative_factors, principal_components


def activations(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape).double()


def test_coordinates_of_any_basis() -> None:
    components, mean = activations(3, 6), activations(1, 6)[0]
    basis = Basis(components, mean)
    code = activations(4, 5, 3)
    h = mean + code @ components
    assert_close(basis.encode(h), code)
    assert_close(basis.decode(code), h)
    other = activations(7, 6)
    found = torch.linalg.lstsq(components.T, (other - mean).T).solution.T
    assert_close(basis.encode(other), found)
    assert repr(basis) == "Basis(3 components of width 6)"
    assert set(basis.state_dict()) == {"components", "mean", "inverse"}


def test_principal_components() -> None:
    rows = activations(50, 6) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1]).double() + 2.0
    basis = principal_components(rows.reshape(5, 10, 6), 3)
    assert_close(basis.components @ basis.components.T, torch.eye(3).double())
    spread = basis.encode(rows).std(0)
    assert bool((spread.diff() < 0).all())
    values = torch.linalg.eigvalsh(rows.T.cov()).flip(0)[:3]
    assert_close(spread.square(), values)
    assert basis.mean is not None
    assert_close(basis.mean, rows.mean(0))
    assert principal_components(rows, 2, center=False).mean is None
    largest = basis.components.gather(1, basis.components.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


def test_coordinates_that_are_not_negative_are_the_nearest() -> None:
    torch.manual_seed(0)
    components = torch.rand(5, 8).double()
    basis = NonNegativeBasis(components)
    h = torch.randn(30, 8).double() + 0.5
    code = basis.encode(h)
    assert bool((code >= 0).all()) and bool((code == 0).any())
    # The conditions of Karush, Kuhn and Tucker.
    slope = (code @ components - h) @ components.T
    assert slope.min() > -1e-9 and (slope * code).abs().max() < 1e-9
    assert repr(basis) == "NonNegativeBasis(5 components of width 8)"


def test_non_negative_factors_are_found_again() -> None:
    torch.manual_seed(0)
    planted = torch.rand(4, 12).double() * (torch.rand(4, 12) < 0.4)
    code = torch.rand(300, 4).double() * (torch.rand(300, 4) < 0.5)
    basis = non_negative_factors(code @ planted, 4)
    assert_close(basis.components.norm(dim=1), torch.ones(4).double())
    similar = basis.components @ (planted / planted.norm(dim=1, keepdim=True)).T
    assert similar.amax(0).min() > 0.99
    rows = code @ planted
    assert (basis.decode(basis.encode(rows)) - rows).norm() < 0.01 * rows.norm()
    assert torch.equal(basis.components, non_negative_factors(rows, 4).components)


def test_relevance_of_non_negative_coordinates() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    hidden = net[:2](torch.randn(100, 4).double()).detach()
    spliced = Spliced({"1": non_negative_factors(hidden, 3)}).on(net)
    method = LRP("epsilon", target=Target("output", 0), input_modules=["1.features"], ledger=True)
    found = method.wrap(spliced)(TensorDict({"input": torch.randn(5, 4).double()}, [5]))
    assert found["ledger", "gap"].abs().max() < 1e-9
    assert found["attr", "1.features"].shape == (5, 3)


ERRORS: dict[str, tuple[Any, str]] = {
    "one axis": (
        lambda: Basis(torch.ones(3)),
        "components are floating-point numbers [features, width], got [3]",
    ),
    "no tensor": (lambda: Basis([[1.0]]), "got list"),
    "the mean": (
        lambda: Basis(torch.eye(3), torch.zeros(2)),
        "the mean of a basis of components [3, 3] is of shape [3], got [2]",
    ),
    "dependent": (
        lambda: Basis(torch.ones(2, 3)),
        "2 components of rank 1 are no basis: coordinates in them are not unique; leave out those",
    ),
    "zero": (
        lambda: NonNegativeBasis(torch.zeros(2, 3)),
        "a component of zeros has no coordinate: leave it out",
    ),
    "integers": (
        lambda: principal_components(torch.ones(3, 3, dtype=torch.long), 1),
        "activations are floating-point numbers [..., width], got [3, 3]",
    ),
    "too many": (
        lambda: principal_components(torch.randn(10, 4), 5),
        "of 10 activations of width 4 there are 1 to 4 components, got n=5",
    ),
    "negative": (
        lambda: non_negative_factors(-torch.rand(10, 4), 2),
        "activations that are negative are no sum of non-negative parts: factor what comes behind a ReLU",
    ),
    "fewer": (
        lambda: non_negative_factors(torch.zeros(10, 4), 2),
        "the activations are sums of 0 components: ask for no more, and not for 2",
    ),
}


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_errors(name: str) -> None:
    made, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        made()
