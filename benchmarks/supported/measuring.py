"""What is measured of one explanation: whether it accounts for all relevance, the same in both flows, how exactly."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tdhook import LRP, Target

__all__ = ["Double", "Subject", "in_precision", "leaves", "measured"]

FLOWS = ("relevance", "gradient")
UNKNOWN = re.compile(r"nothing is known of the operation `(\w+)`|the autograd function `(\w+)`")


@dataclass(frozen=True)
class Subject:
    """What is explained.

    Attributes:
        model: in double precision and evaluation mode.
        single: makes the same model in single precision.
        values: what it reads, by keyword, as ``[batch, ...]``.
        output: which of the tensors that it returns is explained.
        batch: how many elements; 0 where the output has no batch axis, and is explained as a whole.
        sources: paths of modules whose outputs get relevance, where no input is a number.
        fixed: what else it is given.
    """

    model: nn.Module
    single: Callable[[], nn.Module]
    values: dict[str, Tensor]
    output: int
    batch: int
    sources: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)


class Answer(nn.Module):
    """A model that returns one of its outputs, flat: ``[batch, features]``, or ``[features]``."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, list(subject.values), subject.fixed
        self.output, self.batch = subject.output, subject.batch

    def forward(self, *values: Tensor) -> Tensor:
        outputs = self.model(**dict(zip(self.names, values, strict=True)), **self.fixed)
        found: Tensor = leaves(outputs)[self.output]
        return found.reshape(self.batch, -1) if self.batch else found.flatten()


def leaves(outputs: Any) -> list[Any]:
    """All that a model returns, in order."""
    return list(tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs))


class Double(TorchFunctionMode):
    """What a model does in single precision whatever its weights are in (norms, softmax) is done in double."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        given = {k: _double(v) for k, v in (kwargs or {}).items()}
        return func(*map(_double, args), **given)


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_precision(dtype: torch.dtype) -> Iterator[None]:
    """Tensors are made in this precision, and nothing falls back from double to single."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        torch.set_default_dtype(dtype)
        stack.callback(torch.set_default_dtype, before)
        if dtype == torch.float64:
            stack.enter_context(Double())
        torch.manual_seed(0)
        yield


def measured(subject: Subject) -> dict[str, Any]:
    """The row of a model: gap, difference of the flows, error of single precision, the model's own, and unknown operations."""
    double, unknown = _answers(subject, subject.model), set()
    with in_precision(torch.float64), torch.no_grad():
        answer = double(*subject.values.values())
    top = answer.abs().argmax(-1)
    found: dict[str, Tensor] = {}
    gap = 0.0
    for flow in FLOWS:
        with in_precision(torch.float64), _noting(unknown):
            found[flow], ledger = _explained(subject, subject.model, top, flow, ledger=True)
        share = (ledger["gap"] / ledger["target"]).abs()
        gap = max(gap, float(share.max()) if share.isfinite().all() else float("inf"))
    row: dict[str, Any] = {"gap": gap, "flows": difference(found["gradient"], found["relevance"])}
    if unknown:
        row["unknown"] = sorted(unknown)
    worst = 0.0
    single = subject.single()
    for flow in FLOWS:
        with in_precision(torch.float32), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            low, _ = _explained(subject, single, top, flow, ledger=False)
        worst = max(worst, difference(low.double(), found[flow]))
    with in_precision(torch.float64), warnings.catch_warnings(), _shaken(subject) as shaken:
        warnings.simplefilter("ignore")
        moved, _ = _explained(shaken, shaken.model, top, "gradient", ledger=False)
    return row | {"float32": worst, "conditioning": difference(moved, found["gradient"])}


ROUNDING = 2.0**-24
"""By how much a number moves that single precision rounds, as a part of it, at most."""


@contextmanager
def _shaken(subject: Subject) -> Iterator[Subject]:
    """The subject with weights and inputs each moved by as much as single precision may round them.

    They are numbers of single precision, so rounding them again would move nothing: each goes up or down by lot.
    """
    lots = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        sides = torch.randint(0, 2, tensor.shape, generator=lots).to(tensor.dtype) * 2 - 1
        return tensor * (1 + ROUNDING * sides)

    held = [parameter for parameter in subject.model.parameters() if parameter.is_floating_point()]
    before = [tensor.detach().clone() for tensor in held]
    try:
        with torch.no_grad():
            for tensor in held:
                tensor.copy_(moved(tensor))
        values = {k: moved(v) if v.is_floating_point() else v for k, v in subject.values.items()}
        yield replace(subject, values=values)
    finally:
        with torch.no_grad():
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)


def _answers(subject: Subject, model: nn.Module) -> Answer:
    return Answer(subject, model).eval()


def _explained(
    subject: Subject, model: nn.Module, top: Tensor, flow: str, ledger: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Relevance of all that gets some, ``[batch, ...]`` in a row, and the accounts."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in subject.values.items()}
    td = TensorDict(values, batch_size=[subject.batch] if subject.batch else [])
    module = TensorDictModule(_answers(subject, model), in_keys=list(values), out_keys=["answer"])
    method = LRP(
        "attn_lrp",
        target=Target("answer", top),
        flow=flow,
        ledger=ledger,
        use_inputs=not subject.sources,
        input_modules=[f"module.model.{path}" for path in subject.sources],
    )
    read = None if subject.sources else [k for k, v in values.items() if v.is_floating_point()]
    with method.prepare(module, in_keys=read) as run:
        done = run(td)
    relevance = [value for _, value in sorted(done["attr"].items(True, True), key=lambda item: str(item[0]))]
    flat = [
        v.detach().reshape(subject.batch or 1, -1) if _rows(v, subject) else v.detach().reshape(1, -1)
        for v in relevance
    ]
    if len({len(v) for v in flat}) > 1:
        flat = [v.reshape(1, -1) for v in flat]
    accounts = {k: done["ledger", k] for k in ("target", "gap")} if ledger else {}
    return torch.cat(flat, 1), accounts


def _rows(value: Tensor, subject: Subject) -> bool:
    return bool(subject.batch) and value.dim() > 0 and len(value) == subject.batch


def difference(found: Tensor, expected: Tensor) -> float:
    """How far apart they are, as a part of the second's size, of the worst batch element."""
    size = expected.norm(dim=1)
    if not (found.isfinite().all() and size.isfinite().all()) or not size.any():
        return float("inf")
    return float(((found - expected).norm(dim=1) / size.clamp_min(1e-12 * float(size.max()))).max())


@contextmanager
def _noting(unknown: set[str]) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for each in caught:
        unknown.update(a or b for a, b in UNKNOWN.findall(str(each.message)))
