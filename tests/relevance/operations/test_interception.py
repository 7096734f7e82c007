"""What a forward pass may do besides calling layers: it is seen, or told of."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from unchanged import Unchanged

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule, PassRule
from tdhook.selectors import Op

from .checks import (
    FLOWS,
    TINY,
    around,
    assert_balanced,
    assert_same,
    every_flow,
    explained,
    plainly,
    relevance_of,
)

# Operations that nothing is known of.


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 6, dtype=torch.float64)
        self.stage = nn.Sequential(nn.Tanh(), Transforms())
        self.head = nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.trunk(x)))


class Transforms(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.logdet(torch.eye(6, dtype=x.dtype) + 0.1 * x[..., None] * x[:, None])[
            :, None
        ] + torch.special.erfcx(x)


def holds():
    torch.manual_seed(0)
    return Holds(), TensorDict(input=torch.randn(3, 6, dtype=torch.float64), batch_size=[3])


@every_flow
def test_unmatched_operations_are_warned_of_once_with_their_place(flow: str) -> None:
    model, td = holds()
    lrp = LRP(TINY, target=Target("output", 0), flow=flow, on_unmatched="warn")
    with lrp.prepare(model) as module:
        with pytest.warns(
            UserWarning, match=r"`erfcx` in module `stage\.1`.*epsilon rule.*Op\(\"erfcx\"\)"
        ) as found:
            module(td)
        assert len([w for w in found if "erfcx" in str(w.message)]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(td)


@every_flow
def test_unmatched_operations_can_be_an_error(flow: str) -> None:
    model, td = holds()
    unchanged = Unchanged(model, td)
    lrp = LRP(TINY, target=Target("output", 0), flow=flow, on_unmatched="raise")
    with (
        lrp.prepare(model) as module,
        pytest.raises(NotImplementedError, match=r"`erfcx` in module `stage\.1`"),
    ):
        module(td)
    unchanged.check()


@every_flow
def test_unmatched_operations_can_be_ignored(flow: str) -> None:
    model, td = holds()
    lrp = LRP(TINY, target=Target("output", 0), flow=flow, on_unmatched="ignore", ledger=True)
    with warnings.catch_warnings(), lrp.prepare(model) as module:
        warnings.simplefilter("error")
        module(td)
    assert (td["ledger", "gap"].abs() < 1e-9 * td["ledger", "target"].abs()).all()


@every_flow
def test_a_rule_for_it_makes_it_known(flow: str) -> None:
    model, td = holds()
    composite = [*TINY, (Op("erfcx"), PassRule())]
    with LRP(composite, target=Target("output", 0), flow=flow, on_unmatched="raise").prepare(model) as module:
        module(td)


def test_functions_of_integers_and_masks_need_no_rule() -> None:
    def f(h: Tensor) -> Tensor:
        order = h.argsort(-1)
        mask = (h > 0) & torch.isfinite(h) & ~torch.isnan(h)
        counts = torch.bincount(order.flatten(), minlength=6).to(h.dtype)
        return (
            torch.where(mask, h.gather(-1, order), h)
            + 0.0 * counts
            + torch.nn.functional.one_hot(order, 6).sum(1)
        )

    for flow in FLOWS:
        relevance_of(f, flow)


# Gradient modes, functions of one's own, transforms.


@every_flow
def test_what_is_computed_without_gradient_is_a_constant(flow: str) -> None:
    def f(h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = h.norm(dim=-1, keepdim=True)
        return h / scale + h.detach() * 0.0

    def written(h: Tensor) -> Tensor:
        return h / h.norm(dim=-1, keepdim=True).detach()

    assert_same(relevance_of(f, flow), relevance_of(written, flow), 1e-9)


@every_flow
def test_a_detached_share_is_absorbed(flow: str) -> None:
    model, x = around(lambda h: h + h.detach())
    td, _ = explained(model, x, flow)
    assert_same(td["attr", "input"].sum(-1), td["ledger", "target"] / 2, 1e-9)
    assert_same(td["ledger", "absorbed"], td["ledger", "target"] / 2, 1e-9)


class Ensemble(nn.Module):
    """Runs stacked copies of a network under ``torch.vmap``."""

    def __init__(self, use_vmap: bool) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(3)]
        )
        self.use_vmap = use_vmap

    def forward(self, x: Tensor) -> Tensor:
        if not self.use_vmap:
            return torch.stack([net(x) for net in self.nets]).sum(0)
        params, _ = torch.func.stack_module_state(list(self.nets))
        base = self.nets[0]
        made = torch.vmap(lambda p: torch.func.functional_call(base, p, (x,)))(params)
        return made.sum(0)


@every_flow
def test_vmapped_networks(flow: str) -> None:
    found = []
    for use_vmap in (True, False):
        torch.manual_seed(0)
        model = Ensemble(use_vmap).double()
        x = torch.randn(4, 6, dtype=torch.float64)
        composite = [(nn.Linear, EpsilonRule(1e-12)), (nn.Tanh, PassRule())]
        td, _ = explained(model, x, flow, composite, ledger=False)
        found.append(td["attr", "input"])
        torch.testing.assert_close(td["output"], plainly(model, x), rtol=1e-12, atol=1e-12)
    assert_same(*found, 1e-9)


@every_flow
def test_functional_call_with_other_weights(flow: str) -> None:
    class Borrows(nn.Module):
        def __init__(self, functional: bool) -> None:
            super().__init__()
            self.net, self.other, self.functional = nn.Linear(6, 2), nn.Linear(6, 2), functional

        def forward(self, x: Tensor) -> Tensor:
            if self.functional:
                return torch.func.functional_call(self.net, dict(self.other.named_parameters()), (x,))
            return self.other(x)

    found = []
    for functional in (True, False):
        torch.manual_seed(0)
        model = Borrows(functional).double()
        x = torch.randn(3, 6, dtype=torch.float64)
        unchanged = Unchanged(model)
        td, module = explained(model, x, flow)
        unchanged.check()
        assert torch.equal(td["output"], plainly(model, x))
        assert_balanced(td, module)
        found.append(td["attr", "input"])
    assert_same(*found, 1e-12)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_fused_attention_under_a_mask_keeps_its_accounts(dtype: torch.dtype, flow: str) -> None:
    allowed = torch.ones(3, 3).tril().bool()
    mask = allowed if dtype is torch.bool else torch.zeros(3, 3).double().masked_fill(~allowed, -torch.inf)

    class Attends(nn.Module):
        def forward(self, x):
            q = x[:, None]
            return nn.functional.scaled_dot_product_attention(q, 1.5 * q, 0.5 * q, attn_mask=mask).flatten(1)

    lrp = LRP("attn_lrp", target=Target("output", 5), flow=flow, ledger=True)
    td = lrp.wrap(Attends())(TensorDict({"input": torch.randn(2, 3, 4).double()}, [2]))
    assert td["ledger", "gap"].abs().max() < 1e-12
