"""Cases of norms, normalisation, softmax, attention, recurrent networks, and what is written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import (
    ORDER,
    Case,
    const,
    other,
    pictures,
    sequences,
)


def other_cases() -> list[Case]:
    """Norms of vectors, normalisation, softmax, attention, recurrent networks, and what is written out."""
    w, b = const(6, seed=3), const(6, seed=4)
    cw, cb = const(2, seed=5), const(2, seed=6)
    state = torch.zeros(1, 1, 5, dtype=torch.float64)

    def network(name: str, gates: int, states: int):
        params = [
            const(gates * 5, 6, seed=1),
            const(gates * 5, 5, seed=2),
            const(gates * 5, seed=3),
            const(gates * 5, seed=4),
        ]

        def form(h: Tensor) -> Tensor:
            hx = state.expand(1, h.shape[0], 5).contiguous()
            hx = (hx, hx) if states == 2 else hx
            return getattr(torch, name)(sequences(h), hx, params, True, 1, 0.0, False, False, True)[0]

        def cells(h: Tensor) -> Tensor:
            hx = state[0].expand(h.shape[0], 5)
            hx, made = ((hx, hx) if states == 2 else hx), []
            for x in sequences(h).unbind(1):
                hx = getattr(torch, f"{name}_cell")(x, hx, *params)
                made.append(hx[0] if states == 2 else hx)
            return torch.stack(made, 1)

        return {name: form, f"{name}_cell": cells}

    cases = []
    for name, gates, states in (("lstm", 4, 2), ("gru", 3, 1), ("rnn_tanh", 1, 1), ("rnn_relu", 1, 1)):
        forms = network(name, gates, states)
        cases.append(Case(name, "", forms, shows=None))
        cases.append(Case(f"{name}_cell", "", {"": forms[f"{name}_cell"]}, shows=None))
    flat = lambda h: h.view(-1, 4, 6)  # noqa: E731
    cases += [
        Case("cdist", "", {"": lambda h: torch.cdist(h.view(-1, 8, 3), h.view(-1, 8, 3).flip(1) + 0.4)}),
        Case("dist", "", {"": lambda h: torch.dist(h[0, :12], h[0, 12:])[None]}, batch=1),
        Case("hypot", "", {"": lambda h: torch.hypot(h, other(h))}),
        Case(
            "norm",
            "",
            {
                "method": lambda h: h.norm(dim=-1, keepdim=True),
                "torch": lambda h: torch.norm(h, dim=-1, keepdim=True),
                "linalg": lambda h: torch.linalg.norm(h, dim=-1, keepdim=True),
                "vector": lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True),
            },
            shows=None,
        ),
        *(
            Case(name, "", {"": f})
            for name, f in {
                "linalg_norm": lambda h: torch.linalg.norm(h, dim=-1, keepdim=True),
                "linalg_vector_norm": lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True),
                "std": lambda h: h.std(-1, keepdim=True),
                "pairwise_distance": lambda h: F.pairwise_distance(h[:, :12], h[:, 12:], keepdim=True),
            }.items()
        ),
        Case(
            "ldexp",
            "",
            {
                "written": lambda h: h * 2.0 ** (ORDER[:4].repeat(6) - 3),
                "torch": lambda h: torch.ldexp(h, ORDER[:4].repeat(6) - 3),
                "in place": lambda h: h.clone().ldexp_(ORDER[:4].repeat(6) - 3),
            },
            shows=None,
        ),
        Case(
            "frexp",
            "",
            {
                "torch": lambda h: torch.frexp(h)[0],
                "method": lambda h: h.frexp().mantissa,
                "written": lambda h: h * 0.5 ** (h.detach().abs().log2().floor() + 1),
            },
            shows=None,
        ),
        Case(
            "vector_norm",
            "",
            {"": lambda h: torch.linalg.vector_norm(h, 3, dim=-1, keepdim=True)},
            shows=None,
        ),
        Case(
            "atan2",
            "",
            {"torch": lambda h: torch.atan2(h, other(h)), "arctan2": lambda h: torch.arctan2(h, other(h))},
            shows=None,
        ),
        Case(
            "log_softmax",
            "",
            {
                "F": lambda h: F.log_softmax(h, -1),
                "method": lambda h: h.log_softmax(-1),
                "torch": lambda h: torch.log_softmax(h, dim=-1),
                "special": lambda h: torch.special.log_softmax(h, -1),
                "logsumexp": lambda h: h - h.logsumexp(-1, keepdim=True),
            },
            shows=None,
        ),
        *(
            Case(name, "", {"": f})
            for name, f in {
                "logaddexp": lambda h: torch.logaddexp(h, other(h)),
                "logaddexp2": lambda h: torch.logaddexp2(h, other(h)),
                "logcumsumexp": lambda h: h.logcumsumexp(-1),
                "logsumexp": lambda h: h.logsumexp(-1, keepdim=True),
                "softmin": lambda h: F.softmin(h, -1),
            }.items()
        ),
        Case("polar", "", {"": lambda h: torch.polar(h[:, :12].abs(), h[:, 12:]).real}),
        *(
            Case(name, "", {"": f}, shows=None if name == "swapaxes" else name)
            for name, f in {
                "cross_entropy_loss": lambda h: F.cross_entropy(
                    h, torch.arange(h.shape[0]), reduction="none"
                ),
                "det": lambda h: torch.det(_square(h)),
                "linalg_det": lambda h: torch.linalg.det(_square(h)),
                "linalg_inv": lambda h: torch.linalg.inv(_square(h)),
                "inverse": lambda h: torch.inverse(_square(h)),
                "logdet": lambda h: torch.logdet(_square(h) @ _square(h).mT),
                "slogdet": lambda h: torch.slogdet(_square(h))[1],
                "linalg_slogdet": lambda h: torch.linalg.slogdet(_square(h))[1],
                "linalg_solve": lambda h: torch.linalg.solve(_square(h), h[:, 16:20]),
            }.items()
        ),
        Case("linalg_solve", "constant", {"": lambda h: torch.linalg.solve(_square(h).detach(), h[:, :4])}),
        *(
            Case(name, "", forms)
            for name, forms in {
                "view_as_complex": {"": lambda h: torch.view_as_real(_complex(h))},
                "view_as_real": {"": lambda h: torch.view_as_real(_complex(h))},
                "imag": {"": lambda h: _complex(h).imag},
                "complex": {"": lambda h: torch.complex(h[:, :12], h[:, 12:]).imag},
                "conj": {"": lambda h: torch.view_as_real(_complex(h).conj().resolve_conj())},
                "conj_physical": {"": lambda h: torch.view_as_real(_complex(h).conj_physical())},
            }.items()
        ),
        Case(
            "mul",
            "rotary",
            {
                "complex": lambda h: torch.view_as_real(_complex(h) * _TURNS),
                "real": lambda h: torch.stack(
                    [
                        h[:, ::2] * _TURNS.real - h[:, 1::2] * _TURNS.imag,
                        h[:, ::2] * _TURNS.imag + h[:, 1::2] * _TURNS.real,
                    ],
                    -1,
                ),
            },
            shows="mul",
        ),
        Case("abs", "complex", {"": lambda h: _complex(h).abs()}),
        Case(
            "softmax",
            "",
            {
                "F": lambda h: F.softmax(h, -1),
                "method": lambda h: h.softmax(-1),
                "torch": lambda h: torch.softmax(h, dim=-1),
                "special": lambda h: torch.special.softmax(h, -1),
                "module": torch.nn.Softmax(-1),
                "named": lambda h: F.softmax(input=h, dim=1),
                "out": lambda h: torch.softmax(h, -1, out=torch.empty_like(h)),
            },
        ),
        Case(
            "softmax",
            "other axis",
            {
                "F": lambda h: F.softmax(flat(h), 1),
                "method": lambda h: flat(h).softmax(dim=-2),
                "last": lambda h: flat(h).mT.softmax(-1).mT,
            },
            shows=None,
        ),
        Case(
            "softmax",
            "masked",
            {
                "fill": lambda h: torch.softmax(
                    flat(h).masked_fill(torch.ones(4, 6).triu(1).bool(), float("-inf")), -1
                ),
                "add": lambda h: torch.softmax(
                    flat(h) + torch.full((4, 6), float("-inf"), dtype=h.dtype).triu(1), -1
                ),
            },
            shows=None,
        ),
        Case(
            "layer_norm",
            "",
            {
                "F": lambda h: F.layer_norm(flat(h), (6,), w, b, 1e-3),
                "named": lambda h: F.layer_norm(
                    input=flat(h), normalized_shape=(6,), eps=1e-3, bias=b, weight=w
                ),
                "torch": lambda h: torch.layer_norm(flat(h), (6,), w, b, 1e-3),
                "written": lambda h: _written_norm(flat(h), w, b),
                "group": lambda h: F.group_norm(h.view(-1, 6), 1, w, b, 1e-3).view(-1, 4, 6),
            },
            shows=None,
        ),
        Case("layer_norm", "alone", {"": lambda h: F.layer_norm(flat(h), (4, 6))}),
        Case(
            "rms_norm",
            "",
            {
                "F": lambda h: F.rms_norm(flat(h), (6,), w, 1e-3),
                "named": lambda h: torch.rms_norm(flat(h), (6,), weight=w, eps=1e-3),
                "written": lambda h: (
                    w * (flat(h) * torch.rsqrt(flat(h).pow(2).mean(-1, keepdim=True) + 1e-3))
                ),
                "divided": lambda h: flat(h) / (flat(h).square().mean(-1, keepdim=True) + 1e-3).sqrt() * w,
            },
            shows=None,
        ),
        Case("rms_norm", "alone", {"": lambda h: F.rms_norm(flat(h), (6,))}),
        Case(
            "group_norm",
            "",
            {
                "F": lambda h: F.group_norm(h.view(-1, 4, 2, 3), 2, const(4), const(4, seed=1)),
                "torch": lambda h: torch.group_norm(h.view(-1, 4, 2, 3), 2, const(4), const(4, seed=1)),
            },
        ),
        Case(
            "instance_norm",
            "",
            {
                "F": lambda h: F.instance_norm(pictures(h), weight=cw, bias=cb),
                "group": lambda h: F.group_norm(pictures(h), 2, cw, cb),
            },
            shows=None,
        ),
        Case("instance_norm", "alone", {"F": lambda h: F.instance_norm(pictures(h), weight=cw, bias=cb)}),
        Case(
            "instance_norm",
            "running",
            {
                "F": lambda h: F.instance_norm(
                    pictures(h), const(2), const(2, low=0.5), cw, cb, use_input_stats=False
                )
            },
        ),
        Case(
            "scaled_dot_product_attention",
            "",
            {
                "F": lambda h: F.scaled_dot_product_attention(*h.view(-1, 3, 4, 2).unbind(1)),
                "named": lambda h: F.scaled_dot_product_attention(
                    **dict(zip(("query", "key", "value"), h.view(-1, 3, 4, 2).unbind(1), strict=True))
                ),
                "written": lambda h: _attention(*h.view(-1, 3, 4, 2).unbind(1)),
            },
            shows=None,
        ),
        Case(
            "scaled_dot_product_attention",
            "alone",
            {"": lambda h: F.scaled_dot_product_attention(*h.view(-1, 3, 2, 2, 2).unbind(1), is_causal=True)},
        ),
        Case(
            "glu",
            "",
            {"F": lambda h: F.glu(h, -1), "written": lambda h: h[:, :12] * h[:, 12:].sigmoid()},
            shows=None,
        ),
        Case(
            "mse_loss",
            "",
            {
                "F": lambda h: F.mse_loss(h[:, :12], h[:, 12:], reduction="none"),
                "positional": lambda h: F.mse_loss(h[:, :12], h[:, 12:], None, None, "none"),
                "written": lambda h: (h[:, :12] - h[:, 12:]).square(),
            },
            shows=None,
        ),
        Case(
            "mse_loss",
            "mean",
            {
                "F": lambda h: F.mse_loss(h[:, :12], h[:, 12:])[None],
                "written": lambda h: (h[:, :12] - h[:, 12:]).square().mean()[None],
            },
            batch=1,
            shows=None,
        ),
        *(
            Case(
                f"{f.__name__}",
                "",
                {"": lambda h, f=f: f(h, torch.full_like(h, 0.5), reduction="none")},
                shows=None,
            )
            for f in (F.l1_loss, F.smooth_l1_loss, F.huber_loss)
        ),
        Case(
            "cosine_similarity",
            "",
            {"": lambda h: F.cosine_similarity(h[:, :12].view(-1, 3, 4), h[:, 12:].view(-1, 3, 4), dim=-1)},
            shows=None,
        ),
        Case(
            "var",
            "",
            {
                "method": lambda h: h.var(-1, keepdim=True),
                "correction": lambda h: torch.var(h, -1, correction=1, keepdim=True),
                "var_mean": lambda h: torch.var_mean(h, -1, keepdim=True)[0],
            },
            shows=None,
        ),
        Case(
            "var_mean",
            "",
            {"": lambda h: torch.cat(torch.var_mean(h, -1, correction=0, keepdim=True), 1)},
            shows=None,
        ),
        Case("std_mean", "", {"": lambda h: torch.cat(torch.std_mean(h, -1, keepdim=True), 1)}, shows=None),
        Case(
            "normalize",
            "",
            {
                "F": lambda h: F.normalize(flat(h), dim=-1),
                "written": lambda h: flat(h) / flat(h).norm(dim=-1, keepdim=True).clamp_min(1e-12),
            },
            shows=None,
        ),
        Case("multi_head_attention_forward", "", {"": _multi_head}, shows=None),
    ]
    return cases


def _written_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w + b


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def _multi_head(h: Tensor) -> Tensor:
    x = sequences(h).transpose(0, 1)
    made, _ = F.multi_head_attention_forward(
        x,
        x,
        x,
        6,
        2,
        const(18, 6, seed=1),
        const(18, seed=2),
        None,
        None,
        False,
        0.0,
        const(6, 6, seed=3),
        const(6, seed=4),
        training=False,
    )
    return made.transpose(0, 1)


_TURNS = torch.polar(torch.ones(12, dtype=torch.float64), const(12, seed=9, high=3.0))


def _complex(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.view(-1, 12, 2))


def _square(h: Tensor) -> Tensor:
    return h[:, :16].reshape(-1, 4, 4) + 3 * torch.eye(4, dtype=h.dtype)
