"""Cases of products of activations."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from .cases import (
    WIDTH,
    Case,
    const,
    matrices,
    other,
    pictures,
)


def product_cases() -> list[Case]:
    def pair(f):
        return lambda h: f(*matrices(h))

    def rows(f):
        return lambda h: torch.stack([f(row[:12], row[12:]) for row in h])

    a_const = const(3, 4, 3)
    wide = const(WIDTH, WIDTH)
    sparse = torch.where(wide > wide.median(), wide, 0.0).to_sparse()
    cases = [
        Case(
            "matmul",
            "live",
            {
                "torch": pair(torch.matmul),
                "operator": pair(lambda a, b: a @ b),
                "bmm": pair(torch.bmm),
                "method": pair(lambda a, b: a.bmm(b)),
                "einsum": pair(lambda a, b: torch.einsum("bij,bjk->bik", a, b)),
                "mm": pair(lambda a, b: torch.stack([x.mm(y) for x, y in zip(a, b, strict=True)])),
                "out": pair(
                    lambda a, b: torch.matmul(a, b, out=torch.empty(a.shape[0], 3, 3, dtype=a.dtype))
                ),
                "named": pair(lambda a, b: torch.bmm(mat2=b, input=a)),
                "i-operator": pair(lambda a, b: operator.imatmul(a, b)),
                "mul": pair(lambda a, b: (a[..., None] * b[:, None]).sum(2)),
                "tensordot": pair(
                    lambda a, b: torch.stack([torch.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)])
                ),
            },
            shows=None,
        ),
        Case(
            "matmul",
            "constant",
            {
                "torch": pair(lambda a, b: torch.matmul(a, a_const)),
                "operator": pair(lambda a, b: a @ a_const),
            },
            shows="matmul",
        ),
        Case("sparse_mm", "", {"": lambda h: torch.sparse.mm(sparse, h.t()).t()}),
        Case(
            "sparse_mm", "largest", {"": lambda h: torch.sparse.mm(sparse.to_sparse_csr(), h.t(), "amax").t()}
        ),
        Case("sparse_addmm", "", {"": lambda h: torch.sparse.addmm(h.t(), sparse, h.t()).t()}),
        Case("bilinear", "", {"": lambda h: F.bilinear(h[:, :4], h[:, 4:8], const(3, 4, 4))}),
        Case(
            "chain_matmul",
            "",
            {
                "": lambda h: torch.linalg.multi_dot(
                    [h[0, :12].view(3, 4), h[0, 12:].view(4, 3), h[0, :6].view(3, 2)]
                )[None]
            },
            batch=1,
            shows="linalg_multi_dot",
        ),
        Case(
            "cross", "", {"torch": lambda h: torch.cross(h.view(-1, 8, 3), other(h).view(-1, 8, 3), dim=-1)}
        ),
        Case(
            "linalg_cross", "", {"": lambda h: torch.linalg.cross(h.view(-1, 8, 3), other(h).view(-1, 8, 3))}
        ),
        *(
            Case(name, "", {"": rows(getattr(torch, name))})
            for name in ("dot", "inner", "kron", "outer", "vdot")
        ),
        Case(
            "dot",
            "forms",
            {
                "dot": rows(torch.dot),
                "inner": rows(torch.inner),
                "vdot": rows(torch.vdot),
                "matmul": rows(torch.matmul),
                "einsum": rows(lambda a, b: torch.einsum("i,i", a, b)),
                "sum": rows(lambda a, b: (a * b).sum()),
                "vecdot": lambda h: torch.linalg.vecdot(h[:, :12], h[:, 12:])[:, None],
            },
            shows=None,
        ),
        Case(
            "outer",
            "forms",
            {"outer": rows(torch.outer), "ger": rows(torch.ger), "mul": rows(lambda a, b: a[:, None] * b)},
            shows=None,
        ),
        Case("einsum", "", {"": pair(lambda a, b: torch.einsum("bij,bjk->bik", a, b))}),
        Case(
            "linalg_multi_dot",
            "",
            {"": lambda h: torch.linalg.multi_dot([h[0, :12].view(3, 4), h[0, 12:].view(4, 3)])[None]},
            batch=1,
            shows=None,
        ),
        Case("linalg_vecdot", "", {"": lambda h: torch.linalg.vecdot(h[:, :12], h[:, 12:])[:, None]}),
        Case("vecdot", "", {"": lambda h: torch.linalg.vecdot(h[:, :12], h[:, 12:])[:, None]}, shows=None),
        Case(
            "mv", "", {"": lambda h: torch.mv(h[0, :12].view(3, 4), h[0, 12:16])[None]}, batch=1, shows=None
        ),
        Case(
            "tensordot",
            "",
            {"": lambda h: torch.tensordot(h[0, :12].view(3, 4), h[0, 12:].view(4, 3), 1)[None]},
            batch=1,
        ),
        Case(
            "grid_sample",
            "",
            {
                "": lambda h: F.grid_sample(
                    pictures(h)[:, :1], pictures(h)[:, :, :2, :3].permute(0, 2, 3, 1), align_corners=False
                )
            },
            "unit",
            shows=None,
        ),
        Case(
            "grid_sampler",
            "",
            {"": lambda h: torch.grid_sampler(pictures(h)[:, :1], const(h.shape[0], 2, 3, 2), 0, 0, True)},
            "unit",
        ),
    ]
    fused = {
        "addmm": (
            lambda x, a, b: torch.addmm(x, a, b, beta=0.5, alpha=2),
            lambda x, a, b: 0.5 * x + 2 * (a @ b),
        ),
        "baddbmm": (
            lambda x, a, b: torch.baddbmm(x[None], a[None], b[None]),
            lambda x, a, b: x[None] + a[None] @ b[None],
        ),
        "addbmm": (
            lambda x, a, b: torch.addbmm(x, a[None], b[None]),
            lambda x, a, b: x + (a[None] @ b[None]).sum(0),
        ),
        "unread": (
            lambda x, a, b: torch.baddbmm(torch.full_like(x[None], torch.nan), a[None], b[None], beta=0),
            lambda x, a, b: a[None] @ b[None],
        ),
        "addmv": (lambda x, a, b: torch.addmv(x[0], a, b[:, 0]), lambda x, a, b: x[0] + a @ b[:, 0]),
        "addr": (
            lambda x, a, b: torch.addr(x, a[:, 0], b[0]),
            lambda x, a, b: x + torch.outer(a[:, 0], b[0]),
        ),
        "addcmul": (
            lambda x, a, b: torch.addcmul(x, a[:, :3], b[:3], value=0.5),
            lambda x, a, b: x + 0.5 * (a[:, :3] * b[:3]),
        ),
        "addcdiv": (
            lambda x, a, b: torch.addcdiv(x, a[:, :3], b[:3], value=0.5),
            lambda x, a, b: x + 0.5 * (a[:, :3] / b[:3]),
        ),
    }
    weights = const(4, 3)
    for name, pair_of in fused.items():
        for kind in ("live", "constant"):
            forms = {
                k: lambda h, f=f, live=kind == "live": f(
                    h[0, 15:].view(3, 3), h[0, :12].view(3, 4), h[0, 3:15].view(4, 3) if live else weights
                )[None]
                for k, f in zip(("fused", "written"), pair_of, strict=True)
            }
            cases.append(Case(name, kind, forms, batch=1, shows=None))
    return cases
