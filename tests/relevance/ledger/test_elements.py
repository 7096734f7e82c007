"""Probes give each element a number of its own, and accounts find whose an amount is."""

import pytest
import torch

from tdhook.relevance.ledger.elements import Account, each_sign, probes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 15, 16, 17, 160, 161, 512, 513, 20_000)


def told(amount, owners, count, dtype):
    """Whether the amounts, each of one owner, are told apart, and the account."""
    account = Account(amount.to(dtype), count)
    for probe in probes(count, [dtype]):
        factors = probe.weights[owners].to(dtype)
        if not account.agrees(probe, account.amount * factors):
            return False, account
    return account.settle(), account


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", SIZES)
def test_no_two_elements_share_a_number(count, dtype):
    made = probes(count, [torch.float64, dtype])
    assert (count == 1) == (not made)
    if made:
        numbers = sum(probe.digits * probe.place for probe in made)
        assert torch.equal(numbers, torch.arange(count))
        factors = torch.stack([probe.weights for probe in made])
        assert len(factors.unique(dim=1).T) == count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", SIZES[1:])
def test_factors_change_no_digit_of_an_amount(count, dtype):
    for probe in probes(count, [dtype]):
        mantissas, exponents = probe.factors.abs().frexp()
        assert (mantissas == 0.5).all() and (probe.factors.to(dtype).double() == probe.factors).all()
        assert exponents.abs().max() <= probe.base // 4 + 2
        assert torch.equal(probe.digits_of(probe.factors), torch.arange(probe.base))
        amounts = torch.linspace(0.1, 1, 7).to(dtype)
        assert torch.equal(amounts * probe.factors[0].to(dtype) / probe.factors[0].to(dtype), amounts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 7, 200])
@pytest.mark.parametrize("layout", ["rows", "columns", "shuffled", "some"])
def test_amounts_are_found_wherever_they_lie(layout, count, dtype):
    torch.manual_seed(0)
    owners = torch.arange(count).repeat_interleave(6).reshape(count, 6)
    owners = {
        "rows": owners,
        "columns": owners.T,
        "shuffled": owners.flatten()[torch.randperm(6 * count)],
        "some": owners.flatten()[: max(6 * count - 5, 1)],
    }[layout]
    amount = torch.randn(owners.shape, dtype=torch.float64).to(dtype)
    amount.flatten()[0] = 0.0
    apart, account = told(amount, owners, count, dtype)
    assert apart
    expected = torch.zeros(count, dtype=torch.float64)
    expected.index_add_(0, owners.flatten(), amount.double().flatten())
    torch.testing.assert_close(account.sums, expected)
    sizes = torch.zeros(count, dtype=torch.float64)
    sizes.index_add_(0, owners.flatten(), amount.double().abs().flatten())
    torch.testing.assert_close(account.sizes, sizes)
    torch.testing.assert_close(account.rounding, torch.finfo(dtype).eps * sizes)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("count", [2, 3, 40, 600])
@pytest.mark.parametrize("power", range(0, 13, 3))
def test_the_least_share_of_another_element_is_seen(power, count, layout):
    torch.manual_seed(0)
    amount = torch.rand(count, 3, dtype=torch.float64) + 1
    other = torch.zeros_like(amount)
    other[count // 2, 1] = 10.0**-power
    given = (amount + other).T if layout == "columns" else amount + other
    account = Account(given.contiguous(), count)
    agreed = True
    for probe in probes(count, [torch.float64]):
        weights = probe.weights.unsqueeze(1)
        came = amount * weights + other * weights[0 if count // 2 else 1]
        came = came.T if layout == "columns" else came
        agreed = agreed and account.agrees(probe, came.contiguous())
    assert not (agreed and account.settle())


def test_an_amount_that_comes_of_nothing_is_seen():
    amount = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64).T.contiguous()
    account = Account(amount, 2)
    (probe,) = probes(2, [torch.float64])
    came = amount * probe.weights
    came[0, 0] = 1e-9
    assert not (account.agrees(probe, came) and account.settle())


def test_what_is_not_a_number_is_of_its_row_or_of_all():
    amount = torch.ones(3, 3, dtype=torch.float64)
    amount[1, 2] = torch.nan
    apart, account = told(amount, torch.arange(3)[:, None].expand(3, 3), 3, torch.float64)
    assert apart and account.sums.isnan().tolist() == [False, True, False]
    apart, account = told(amount, torch.arange(3).expand(3, 3), 3, torch.float64)
    assert apart and account.sums.isnan().all()


def test_nothing_is_of_nobody():
    apart, account = told(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.long), 3, torch.float32)
    assert apart and torch.equal(account.sums, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("count", [2, 33, 20_000])
def test_signs_are_balanced_and_the_same_each_time(count):
    signs = each_sign(count)
    assert signs.sum() in (0, 1) and torch.equal(signs.abs(), torch.ones(count, dtype=torch.float64))
    state = torch.get_rng_state()
    assert torch.equal(signs, each_sign(count)) and torch.equal(state, torch.get_rng_state())
