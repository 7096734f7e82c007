"""Cases of element-wise operations."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from .cases import WIDTH, Case, const, forms_of

_DOMAINS = {
    "unit": "acos asin atanh erfinv",
    "positive": "digamma lgamma log log10 log2 logit rsqrt sqrt",
    "large": "acosh",
    "signed": """
        abs asinh atan ceil celu cos cosh elu erf erfc exp exp2 expm1 fix floor frac gelu hardshrink hardsigmoid
        hardswish hardtanh i0 leaky_relu logsigmoid mish nan_to_num reciprocal relu relu6 round rrelu selu sgn sigmoid
        sign silu sin sinc sinh softplus softshrink softsign square tan tanh tanhshrink trunc
    """,
}
_SYNONYMS = {
    "abs": "absolute",
    "acos": "arccos",
    "acosh": "arccosh",
    "asin": "arcsin",
    "asinh": "arcsinh",
    "atan": "arctan",
    "atanh": "arctanh",
    "sigmoid": "expit",
}
# Names under which only a module of torch.nn.functional has them, or which need another argument.
_DIVISOR = const(WIDTH, low=0.3, high=0.7)
_EXPONENT = const(WIDTH, seed=1, low=0.5, high=2.5)


def elementwise_cases() -> list[Case]:
    cases = []
    for domain, names in _DOMAINS.items():
        for name in names.split():
            forms = forms_of(name)
            if name in _SYNONYMS:
                forms |= forms_of(_SYNONYMS[name])
            forms.pop("F.rrelu_", None)
            cases.append(Case(name, "", forms, domain))
    cases += [
        Case("log1p", "", forms_of("log1p"), "positive"),
        Case(
            "clamp",
            "",
            forms_of("clamp", min=-0.7, max=1.1)
            | {f"clip.{k}": f for k, f in forms_of("clip", min=-0.7, max=1.1).items()}
            | {
                "positional": lambda h: h.clamp(-0.7, 1.1),
                "one-after-other": lambda h: h.clamp_min(-0.7).clamp_max(1.1),
            },
            shows=None,
        ),
        Case(
            "clamp",
            "tensors",
            forms_of("clamp", min=-const(WIDTH, low=0.5), max=const(WIDTH, low=0.2, high=1.5)),
        ),
        Case(
            "clamp", "live bounds", {"torch": lambda h: torch.clamp(h, min=h.roll(1, -1) - 1)}, shows="clamp"
        ),
        Case("clamp_max", "", forms_of("clamp_max", 0.8)),
        Case("clamp_min", "", forms_of("clamp_min", -0.8)),
        Case(
            "pow",
            "number",
            {**forms_of("pow", 2.0), "operator": lambda h: h**2.0, "square": torch.square},
            shows=None,
        ),
        Case(
            "pow", "constant", {**forms_of("pow", _EXPONENT), "operator": lambda h: h**_EXPONENT}, "positive"
        ),
        Case("pow", "i-operator", {"torch": lambda h: h.pow(3), "i": lambda h: operator.ipow(h, 3)}),
        Case(
            "pow",
            "live",
            {
                "torch": lambda h: torch.pow(h, h.roll(1, -1)),
                "operator": lambda h: h ** h.roll(1, -1),
                "detached": lambda h: h ** h.roll(1, -1).detach(),
            },
            "positive",
        ),
        Case("rpow", "", {"operator": lambda h: 1.7**h}),
        Case("float_power", "", forms_of("float_power", 2.0, out=False)),
        Case("float_power", "live", {"torch": lambda h: torch.float_power(h, h.roll(1, -1))}, "positive"),
        Case(
            "floor_divide",
            "",
            {
                **forms_of("floor_divide", _DIVISOR),
                "operator": lambda h: h // _DIVISOR,
                "i-operator": lambda h: operator.ifloordiv(h, _DIVISOR),
            },
        ),
        Case("floor_divide", "live", {"torch": lambda h: torch.floor_divide(h, h.roll(1, -1))}),
        Case("fmod", "", forms_of("fmod", 0.7)),
        Case("fmod", "live", {"torch": lambda h: torch.fmod(h, h.roll(1, -1))}),
        Case(
            "remainder",
            "",
            {
                **forms_of("remainder", 0.7),
                "operator": lambda h: h % 0.7,
                "i-operator": lambda h: operator.imod(h, 0.7),
            },
        ),
        Case("remainder", "live", {"torch": lambda h: torch.remainder(h, h.roll(1, -1))}),
        Case("rdiv", "", {"operator": lambda h: 1.5 / h, "method": lambda h: h.__rdiv__(1.5)}),
        Case("rdiv", "reciprocal", {"torch": lambda h: 1.0 / h, "reciprocal": torch.reciprocal}, shows=None),
        Case(
            "prelu",
            "",
            {
                **forms_of("prelu", torch.tensor(0.2, dtype=torch.float64)),
                "leaky": lambda h: F.leaky_relu(h, 0.2),
            },
            shows=None,
        ),
        Case("threshold", "", forms_of("threshold", 0.1, 0.1, out=False)),
        Case("xlogy", "", forms_of("xlogy", _DIVISOR)),
        Case("xlogy", "reversed", {"torch": lambda h: torch.xlogy(_DIVISOR, h)}, "positive"),
        Case(
            "xlogy",
            "live",
            {"torch": lambda h: torch.xlogy(h, h.roll(1, -1)), "mul": lambda h: h * h.roll(1, -1).log()},
            "positive",
            shows=None,
        ),
        Case("gelu", "tanh", {"F": lambda h: F.gelu(h, approximate="tanh")}),
        Case(
            "relu",
            "as clamp",
            {
                "torch": torch.relu,
                "clamp": lambda h: h.clamp(min=0),
                "maximum": lambda h: h.clamp_min_(0),
                "chain": lambda h: torch.relu_(h).relu_(),
            },
            shows=None,
        ),
        Case("silu", "gated", {"F": F.silu}, shows="silu"),
        Case("round", "decimals", {"torch": lambda h: torch.round(h, decimals=1)}),
        Case("softplus", "beta", {"F": lambda h: F.softplus(h, beta=2.0, threshold=3.0)}),
    ]
    return cases
