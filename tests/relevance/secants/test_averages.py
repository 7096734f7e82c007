"""Any function: its vector-Jacobian product averaged on the way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tdhook.relevance.secants.averages import average

from .pairs import assert_all_arrives, integrated, pair_of, random_grads

FUNCTIONS = {
    "cosine": (lambda a, b: F.cosine_similarity(a, b, dim=-1), 2),
    "norm": (lambda a: a.norm(dim=-1), 1),
    "prod": (lambda a: a.prod(-1), 1),
    "cumprod": (lambda a: a.cumprod(-1), 1),
    "pow": (lambda a, b: (a.abs() + 0.5) ** b, 2),
    "smooth_l1": (lambda a, b: F.smooth_l1_loss(a, b, reduction="none"), 2),
    "det": (lambda a: torch.linalg.det(a @ a.mT + torch.eye(4)), 1),
    "huber": (lambda a: F.huber_loss(a, torch.zeros_like(a), reduction="none"), 1),
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_all_arrives(name: str) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        function, count = FUNCTIONS[name]
        ends, starts = [torch.randn(4, 4) for _ in range(count)], [torch.randn(4, 4) for _ in range(count)]
        pair = pair_of(name, function, ends, starts)
        grads = random_grads(pair)
        found = average(pair, grads)
        assert_all_arrives(pair, grads, found, 1e-10)
        for share, wanted in zip(found, integrated(pair, grads), strict=True):
            assert (share - wanted).abs().max() < 0.02 * wanted.abs().max()
    finally:
        torch.set_default_dtype(torch.float32)


def test_where_both_are_the_same_it_is_the_derivative() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    pair = pair_of("cosine", lambda a, b: F.cosine_similarity(a, b, dim=-1), [a, b], [a, b])
    grads = random_grads(pair)
    for share, wanted in zip(average(pair, grads), integrated(pair, grads, 1), strict=True):
        assert torch.allclose(share, wanted)


def test_single_precision() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 50), torch.randn(3, 50)
    pair = pair_of("norm", lambda a: a.norm(dim=-1), [a], [b])
    grads = random_grads(pair)
    assert_all_arrives(pair, grads, average(pair, grads), 1e-5)


def test_unused_inputs_get_nothing() -> None:
    a, b = torch.randn(3), torch.randn(3)
    pair = pair_of("own", lambda a, b: a.exp(), [a, b], [b, a])
    assert average(pair, [torch.ones(3)])[1] is None


MIRRORED = {
    "in other elements": lambda x: x,
    "in the same element": lambda x: x.reshape(1, -1),
}


@pytest.mark.parametrize("where", sorted(MIRRORED))
@pytest.mark.parametrize("name", ["pow", "atan2"])
def test_what_is_mirrored_hides_no_miss(name: str, where: str) -> None:
    """Sums are right by chance where what one misses another makes: more nodes are taken all the same."""
    torch.manual_seed(0)
    functions = {"pow": lambda a, b: (b.abs() + 0.5) ** a - (b.abs() + 0.5) ** -a, "atan2": torch.atan2}

    def both(x: torch.Tensor, sign: float) -> torch.Tensor:
        return MIRRORED[where](torch.stack([x, sign * x]))

    a, a0, b, b0 = (torch.rand(6).double() + 0.1 for _ in range(4))
    ends, starts = [both(a, -1), both(b, 1)], [both(a0, -1), both(b0, 1)]
    pair = pair_of(name, functions[name], ends, starts)
    grads = [torch.ones_like(pair.outputs[0])]
    shares = [g * d for g, d in zip(average(pair, grads), pair.steps, strict=True)]
    torch.testing.assert_close(sum(shares), pair.rises[0], rtol=1e-10, atol=1e-10)


def test_functions_of_each_place_are_right_at_each_where_they_jump() -> None:
    """What nodes do not see of steps and kinks is shared at each place: nothing of it by others."""
    torch.manual_seed(0)
    a, a0, b, b0 = (2 * torch.randn(5, 4).double() for _ in range(4))
    for function in (lambda a, b: torch.round(a * b), torch.copysign, lambda a, b: torch.complex(a, b).abs()):
        pair = pair_of("own", function, [a, b], [a0, b0])
        grads = random_grads(pair)
        shares = [g * d for g, d in zip(average(pair, grads), pair.steps, strict=True)]
        torch.testing.assert_close(sum(shares), grads[0] * pair.rises[0])
    pair = pair_of("abs", torch.abs, [torch.complex(a, b)], [torch.complex(a0, b0)], live=[0])
    (found,) = average(pair, grads := random_grads(pair))
    share = (torch.view_as_real(found) * torch.view_as_real(pair.steps[0])).sum(-1)
    torch.testing.assert_close(share, grads[0] * pair.rises[0])


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4)])
def test_the_first_axis_may_be_none_of_elements(shape: tuple[int, ...]) -> None:
    """Features that meet are no rows: a batch of one and what has no batch are shared alike."""
    torch.manual_seed(0)
    weights = torch.randn(4, 4).double()

    def functions(x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.linalg.solve(weights, x.mT if x.dim() > 1 else x), x / x.abs().amax(-1, keepdim=True)]

    x, start = torch.randn(shape).double(), torch.randn(shape).double()
    for i in range(2):
        pair = pair_of("own", lambda x, i=i: functions(x)[i], [x], [start])
        grads = random_grads(pair)
        found = average(pair, grads)
        assert_all_arrives(pair, grads, found)
        if i == 0:
            torch.testing.assert_close(found[0], pair.pull(0.5, grads)[0][0])


def test_what_has_no_derivative_beside_is_held() -> None:
    torch.manual_seed(0)
    x, start, weight = torch.randn(3, 4).double(), torch.randn(3, 4).double(), torch.rand(4).double()
    to = torch.tensor([0, 2, 1])
    pair = pair_of(
        "cross_entropy_loss", F.cross_entropy, [x, to, weight], [start, to, weight.clone()], live=[0]
    )
    grads = random_grads(pair)
    assert_all_arrives(pair, grads, average(pair, grads), 1e-10)
