"""Functions of lists of tensors, and operators that take functions: what they do is seen call by call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from .cases import const
from .checks import assert_same, every_flow, relevance_of

# torch compiles such operators where they are not explained, and warns of what it meets.
pytestmark = pytest.mark.filterwarnings("ignore")
W = const(6)


def halves(h: Tensor) -> tuple[Tensor, Tensor]:
    return h[:, :3] * 1, h[:, 3:] * 1


def listed(h: Tensor) -> Tensor:
    a, b = halves(h)
    c, d = torch._foreach_addcmul([a, b], [a, b], [b, a], value=0.3)
    e = torch._foreach_lerp(torch._foreach_tanh([c, d]), [a, b], 0.3)
    return torch.cat(
        [*torch._foreach_mul(e, [2.0, 3.0]), *(n.expand(len(h), 1) for n in torch._foreach_norm([a]))], -1
    )


def singly(h: Tensor) -> Tensor:
    a, b = halves(h)
    c, d = torch.addcmul(a, a, b, value=0.3), torch.addcmul(b, b, a, value=0.3)
    e = c.tanh().lerp(a, 0.3), d.tanh().lerp(b, 0.3)
    return torch.cat([e[0] * 2.0, e[1] * 3.0, torch.linalg.vector_norm(a).expand(len(h), 1)], -1)


def listed_in_place(h: Tensor) -> Tensor:
    a, b = halves(h)
    torch._foreach_mul_([a, b], 0.5)
    torch._foreach_add_([a], [b], alpha=2)
    torch._foreach_tanh_([b])
    return torch.cat([a, b], -1)


def singly_in_place(h: Tensor) -> Tensor:
    a, b = halves(h)
    a.mul_(0.5), b.mul_(0.5)
    a.add_(b, alpha=2)
    return torch.cat([a, b.tanh_()], -1)


def branch(h: Tensor) -> Tensor:
    outer = h * 3
    chosen = torch.cond(
        h.sum() > -100,
        lambda named, pair: {"a": named["x"].tanh() * outer, "b": pair[0] * W},
        lambda named, pair: {"a": named["x"] + 0, "b": pair[0] + 0},
        ({"x": h}, (h * 2,)),
    )
    return chosen["a"] + chosen["b"]


def loop(h: Tensor) -> Tensor:
    def body(i: Tensor, d: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return i + 1, {"x": (d["x"] * 2).tanh()}

    _, found = while_loop(lambda i, d: i < 3, body, (torch.tensor(0), {"x": h}))
    return found["x"]


def looped(h: Tensor) -> Tensor:
    for _ in range(3):
        h = (h * 2).tanh()
    return h


def scanned(h: Tensor) -> Tensor:
    (a, b), made = scan(
        lambda carry, x: (
            (carry[0].tanh() + x["u"], carry[1] * W[0]),
            {"p": carry[0] * 1, "q": (carry[1] + x["u"],)},
        ),
        (h[:, 0].clone(), h[:, 1].clone()),
        {"u": h.T.clone()},
        reverse=True,
    )
    return a[:, None] + b[:, None] + made["p"].T + made["q"][0].T


def stepped(h: Tensor) -> Tensor:
    a, b, p, q = h[:, 0], h[:, 1], [], []
    for x in reversed(h.T.unbind()):
        p.append(a)
        q.append(b + x)
        a, b = a.tanh() + x, b * W[0]
    return a[:, None] + b[:, None] + torch.stack(p[::-1]).T + torch.stack(q[::-1]).T


SAME = {
    "lists": (listed, singly),
    "lists in place": (listed_in_place, singly_in_place),
    "overloads of lists": (
        lambda h: torch.cat(torch.ops.aten._foreach_mul.Scalar(list(halves(h)), 2.0), -1),
        lambda h: h * 2.0,
    ),
    "branch": (branch, lambda h: h.tanh() * (h * 3) + (h * 2) * W),
    "loop": (loop, looped),
    "scan": (scanned, stepped),
    "map": (lambda h: mapped(lambda x, w: x.tanh() * w, h, W), lambda h: h.tanh() * W),
}


@every_flow
@pytest.mark.parametrize("case", SAME)
def test_explained_call_by_call(case: str, flow: str) -> None:
    together, apart = SAME[case]
    assert_same(relevance_of(together, flow), relevance_of(apart, flow), 1e-8)


@every_flow
def test_an_associative_scan(flow: str) -> None:
    def f(h: Tensor) -> Tensor:
        return associative_scan(lambda a, b: a + b, h, 1, combine_mode="generic")

    assert_same(relevance_of(f, flow), relevance_of(lambda h: h.cumsum(-1), flow), 1e-6)
