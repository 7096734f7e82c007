"""Cases of sums and products, quotients, means, and what else adds up."""

from __future__ import annotations

import operator
from functools import partial

import torch
import torch.nn.functional as F

from .cases import (
    ORDER,
    WIDTH,
    Case,
    calling,
    const,
    even,
    forms_of,
    other,
    sequences,
    shaped_for,
)

_C = const(WIDTH, seed=5, low=0.4, high=1.6)


def _binary(name: str, operator_name: str, second, **kwargs) -> dict:
    """A function of two arguments in all its forms; ``second`` makes the other one of ``h``."""
    f = getattr(torch, name)
    ways = {
        "torch": lambda h: f(h, second(h), **kwargs),
        "keyword": lambda h: f(input=h, other=second(h), **kwargs),
        "method": lambda h: getattr(h, name)(second(h), **kwargs),
        "method_": lambda h: getattr(h, f"{name}_")(second(h), **kwargs),
        "out": lambda h: f(h, second(h), out=torch.empty_like(h), **kwargs),
        "out self": lambda h: f(h, second(h), out=h, **kwargs),
    }
    if not kwargs:
        ways["operator"] = lambda h: getattr(operator, operator_name)(h, second(h))
        ways["i-operator"] = lambda h: getattr(operator, f"i{operator_name}")(h, second(h))
    return ways


def _lengths(h: torch.Tensor) -> torch.Tensor:
    return torch.tensor([4, 12, 8]).expand(len(h), 3)


def affine_cases() -> list[Case]:
    cases = []
    for name, symbol, synonyms in (
        ("add", "add", ()),
        ("sub", "sub", ("subtract",)),
        ("mul", "mul", ("multiply",)),
        ("div", "truediv", ("divide", "true_divide")),
    ):
        for kind, second in (("live", other), ("constant", lambda h: _C), ("number", lambda h: 1.7)):
            forms = _binary(name, symbol, second)
            for synonym in synonyms:
                forms |= {f"{synonym} {k}": f for k, f in _binary(synonym, symbol, second).items()}
            if kind == "number":
                for key in [k for k in forms if "keyword" in k]:
                    forms.pop(key)
            cases.append(Case(name, kind, forms))
    cases += [
        Case("add", "alpha", _binary("add", "add", other, alpha=0.3)),
        Case(
            "add",
            "reversed",
            {"torch": lambda h: torch.add(_C, h), "operator": lambda h: _C + h, "radd": lambda h: h + _C},
        ),
        Case(
            "add",
            "number first",
            {
                "operator": lambda h: 1.7 + h,
                "method": lambda h: h.add(1.7),
                "radd": lambda h: h.__radd__(1.7),
            },
        ),
        Case(
            "add",
            "broadcast",
            {"operator": lambda h: h + h[:, :1], "expand": lambda h: h + h[:, :1].expand(-1, WIDTH)},
        ),
        Case(
            "add",
            "itself",
            {"operator": lambda h: h + h, "mul": lambda h: h * 2, "i": lambda h: h.add_(h)},
            shows=None,
        ),
        Case("sub", "alpha", _binary("sub", "sub", other, alpha=0.3)),
        Case(
            "rsub",
            "",
            {"torch": lambda h: torch.rsub(h, 1.7), "operator": lambda h: 1.7 - h, "neg": lambda h: -h + 1.7},
            shows=None,
        ),
        Case(
            "rsub",
            "live",
            {"torch": lambda h: torch.rsub(h, other(h)), "sub": lambda h: other(h) - h},
            shows=None,
        ),
        Case("rsub", "alone", {"torch": lambda h: torch.rsub(h, other(h))}),
        Case("mul", "reversed", {"operator": lambda h: _C * h, "torch": lambda h: torch.mul(_C, h)}),
        Case("mul", "number first", {"operator": lambda h: 1.7 * h, "method": lambda h: h.mul(1.7)}),
        Case(
            "mul",
            "broadcast",
            {"operator": lambda h: h * h[:, :1], "expand": lambda h: h * h[:, :1].expand(-1, WIDTH)},
        ),
        Case(
            "mul",
            "rsqrt",
            {
                "mul": lambda h: h * torch.rsqrt(other(h)),
                "reversed": lambda h: torch.rsqrt(other(h)) * h,
                "reciprocal": lambda h: h * other(h).sqrt().reciprocal(),
                "rdiv": lambda h: h * (1 / other(h).sqrt()),
                "div": lambda h: h / other(h).sqrt(),
                "i": lambda h: h.clone().mul_(torch.rsqrt(other(h))),
            },
            "positive",
            shows=None,
        ),
        Case(
            "mul",
            "gate",
            {"mul": lambda h: h * other(h).sigmoid(), "F": lambda h: F.sigmoid(other(h)) * h},
            shows="mul",
        ),
        Case(
            "div",
            "broadcast",
            {"operator": lambda h: h / h[:, :1], "expand": lambda h: h / h[:, :1].expand(-1, WIDTH)},
        ),
        Case(
            "div",
            "rounded",
            {
                "torch": lambda h: torch.div(h, 0.7, rounding_mode="floor"),
                "method": lambda h: h.div(0.7, rounding_mode="floor"),
            },
        ),
        Case("neg", "", {**forms_of("neg"), **forms_of("negative"), "operator": lambda h: -h}),
        Case(
            "mean",
            "",
            {
                "method": lambda h: sequences(h).mean(1),
                "torch": lambda h: torch.mean(sequences(h), dim=1),
                "sum": lambda h: sequences(h).sum(1) / 4,
            },
            shows=None,
        ),
        Case(
            "mean",
            "all",
            {"method": lambda h: h.mean()[None], "sum": lambda h: (h.sum() / h.numel())[None]},
            "positive",
            shows=None,
            batch=1,
        ),
        Case("mean", "alone", {"": lambda h: h.mean(-1, keepdim=True)}, shows="mean"),
        Case("nanmean", "", {"": lambda h: h.nanmean(-1, keepdim=True)}),
        Case("nansum", "", {"": lambda h: h.nansum(-1, keepdim=True)}),
        Case(
            "sum",
            "",
            {
                "method": lambda h: h.sum(-1, keepdim=True),
                "torch": lambda h: torch.sum(h, -1, True),
                "einsum": lambda h: torch.einsum("bi->b", h)[:, None],
                "matmul": lambda h: h @ torch.ones(WIDTH, 1, dtype=h.dtype),
                "cumsum": lambda h: h.cumsum(-1)[:, -1:],
                "out": lambda h: torch.sum(h, -1, True, out=torch.empty(0, dtype=h.dtype)),
                "loop": lambda h: sum(h.unbind(1))[:, None],
                "sum_to_size": lambda h: h.sum_to_size(h.shape[0], 1),
            },
            shows=None,
        ),
        Case("sum", "alone", {"": lambda h: h.sum(-1, keepdim=True)}, shows="sum"),
        Case("sum_to_size", "", {"": lambda h: h.sum_to_size(h.shape[0], 1)}),
        Case("cumsum", "", forms_of("cumsum", -1)),
        Case(
            "diff", "", {"torch": lambda h: torch.diff(h), "sub": lambda h: h[:, 1:] - h[:, :-1]}, shows=None
        ),
        Case("diff", "alone", {"": lambda h: torch.diff(h)}, shows="diff"),
        Case(
            "trace",
            "",
            {
                "trace": lambda h: torch.stack([s[:, :4].trace() for s in sequences(h)])[:, None],
                "diagonal": lambda h: sequences(h)[..., :4].diagonal(dim1=1, dim2=2).sum(-1, keepdim=True),
            },
            shows=None,
        ),
        Case("trace", "alone", {"": lambda h: sequences(h)[0, :, :4].trace()[None]}, batch=1, shows="trace"),
        Case("trapezoid", "", {"": lambda h: torch.trapezoid(sequences(h))}),
        Case("deg2rad", "", forms_of("deg2rad")),
        Case("rad2deg", "", forms_of("rad2deg")),
        Case(
            "lerp",
            "number",
            {
                "torch": lambda h: torch.lerp(h, other(h), 0.3),
                "in place": lambda h: h.lerp_(other(h), 0.3),
                "sum": lambda h: 0.7 * h + 0.3 * other(h),
            },
            shows=None,
        ),
        Case(
            "lerp", "constant", {"": lambda h: torch.lerp(h, other(h), const(WIDTH, low=0.1))}, shows="lerp"
        ),
        Case(
            "lerp",
            "live",
            {
                "torch": lambda h: torch.lerp(h, other(h), h.roll(3, -1)),
                "written": lambda h: h + h.roll(3, -1) * (other(h) - h),
            },
            shows=None,
        ),
        Case(
            "index_add",
            "",
            {
                "torch": lambda h: torch.index_add(h, 1, ORDER, even(h)),
                "in place": lambda h: h.index_add_(1, ORDER, even(h)),
            },
        ),
        Case(
            "index_reduce",
            "",
            {"": lambda h: h.index_reduce(1, torch.tensor([1, 4, 2]), h[:, :3] * 2, "mean")},
        ),
        Case(
            "segment_reduce",
            "",
            {"": lambda h: torch.segment_reduce(h, "sum", lengths=_lengths(h), axis=1)},
        ),
        Case("cumprod", "", {**forms_of("cumprod", -1)}),
        Case(
            "prod",
            "",
            {
                "method": lambda h: h.prod(1, keepdim=True),
                "torch": lambda h: torch.prod(h, dim=1, keepdim=True),
                "scatter_reduce": lambda h: h.new_zeros(len(h), 1).scatter_reduce(
                    1, torch.zeros(h.shape, dtype=torch.int64), h, "prod", include_self=False
                ),
            },
            shows=None,
        ),
        Case(
            "scatter_add",
            "",
            {
                "torch": lambda h: h.scatter_add(1, ORDER.expand(h.shape[0], -1), even(h)),
                "in place": lambda h: h.scatter_add_(1, ORDER.expand(h.shape[0], -1), even(h)),
                "reduce": lambda h: h.scatter_reduce(1, ORDER.expand(h.shape[0], -1), even(h), "sum"),
            },
            shows=None,
        ),
        Case(
            "scatter_add",
            "alone",
            {"": lambda h: h.scatter_add(1, ORDER.expand(h.shape[0], -1), even(h))},
            shows="scatter_add",
        ),
        Case(
            "scatter_reduce",
            "",
            {"": lambda h: h.scatter_reduce(1, ORDER.expand(h.shape[0], -1), even(h), "mean")},
        ),
        Case(
            "scatter_reduce",
            "amax",
            {"": lambda h: h.scatter_reduce(1, ORDER.expand(h.shape[0], -1), even(h), "amax")},
        ),
        Case(
            "embedding_bag",
            "",
            {"": lambda h: F.embedding_bag(torch.tensor([[1, 0, 1]]), h[0].view(4, 6), mode="sum")},
            batch=1,
        ),
        Case(
            "dropout",
            "eval",
            {
                name: lambda h, f=f: f(h, 0.5, False)
                for name, f in (("F", F.dropout), ("torch", torch.dropout), ("in place", torch.dropout_))
            },
        ),
        *(
            Case(name, "eval", {"": calling(torch, name, 0.5, False)})
            for name in ("alpha_dropout", "feature_dropout", "feature_alpha_dropout")
        ),
        *(
            Case(name, "", {"": calling(torch, name, 0.5, True, first=sequences)})
            for name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
        ),
        *(
            Case(
                f"dropout{n}d",
                "",
                {"": calling(F, f"dropout{n}d", 0.3, True, first=partial(shaped_for, f"{n}d"))},
                shows=None,
            )
            for n in (1, 2, 3)
        ),
        Case(
            "dropout",
            "train",
            {
                "F": lambda h: F.dropout(h, 0.5, True),
                "in place": lambda h: F.dropout(h, 0.5, True, inplace=True),
            },
        ),
    ]
    return cases
