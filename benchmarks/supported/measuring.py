"""What is measured of one explanation: whether it accounts for all relevance, the same in both flows, how exactly."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from benchmarks.supported.status import worse
from tdhook import LRP, Target
from tdhook.attribution import Attribution, GradientTimesInput

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
    """The row of a model: gap, difference of the flows, error of single precision, the model's own, what is unknown."""
    top, unknown = _explained_value(subject), set()
    found: dict[str, Tensor] = {}
    gap = 0.0
    for flow in FLOWS:
        with in_precision(torch.float64), _noting(unknown):
            found[flow], ledger = _explained(subject, subject.model, top, _lrp(flow, ledger=True))
        # What cancels is rounded as it is large: where relevance grows on its way, the target is nothing to measure by.
        largest = torch.stack([ledger[key].abs() for key in ("target", "inputs", "absorbed")]).amax(0)
        share = ledger["gap"].abs() / largest
        gap = max(gap, float(share.max()) if share.isfinite().all() else float("inf"))
    row: dict[str, Any] = {"gap": gap, "flows": difference(found["gradient"], found["relevance"])}
    if unknown:
        row["unknown"] = sorted(unknown)
    single = subject.single()
    try:
        row["float32"] = max(
            difference(_relevance(subject, single, top, torch.float32, _lrp(flow)), found[flow])
            for flow in FLOWS
        )
    except ValueError as error:  # relevance that double precision holds
        if OVERFLOWS not in str(error):
            raise
        row |= {"float32": float("inf"), "largest": float(max(each.abs().max() for each in found.values()))}
        row["raised"] = f"ValueError: {str(error).splitlines()[0][:300]}"
    row["conditioning"] = _conditioning(subject, single, top, found["gradient"], row["float32"])
    return row


def _explained_value(subject: Subject) -> Tensor:
    """Which value of each batch element is explained, ``[batch]`` or ``[]``: the largest that depends on what is read.

    Not each does: where a box was cut to its image, its edge is that of the image. The largest of all where none of the
    :data:`TRIES` largest does.
    """
    with in_precision(torch.float64), torch.no_grad():
        size = _answers(subject, subject.model)(*subject.values.values()).abs()
    first = size.argmax(-1)
    left = size.clone()
    top = first.clone()
    for _ in range(min(TRIES, size.shape[-1])):
        moved = _relevance(subject, subject.model, top, torch.float64, GradientTimesInput)
        still = (moved == 0).all(1).expand(subject.batch or 1).reshape(top.shape)
        if not still.any():
            return top
        left.scatter_(-1, top.unsqueeze(-1), -1.0)
        top = torch.where(still, left.argmax(-1), top)
    return first


TRIES = 32
"""How many values are looked at, for one that depends on what is read."""
OVERFLOWS = "is NaN or infinite though the target is finite"
"""What the library says of relevance that is more than a precision holds."""
ROUNDING = 2.0**-24
"""By how much a number moves that single precision rounds, as a part of it, at most."""
DRAWS = 4
"""How many times weights and inputs are moved, while single precision is worse than what was found."""


def _conditioning(subject: Subject, single: nn.Module, top: Tensor, expected: Tensor, error: float) -> float:
    """How far relevance moves by rounding alone, whatever computes it; ``error`` is that of single precision.

    In double precision, with weights and inputs rounded. Where that does not tell, by as much as single precision moves
    plain gradient times input, which no rule has a part in: a unit that is nearly zero, say, is on in one, off in the
    other.
    """
    found = 0.0
    for seed in range(DRAWS):
        with _shaken(subject, seed) as shaken:
            moved = _relevance(shaken, shaken.model, top, torch.float64, _lrp("gradient"))
        found = max(found, difference(moved, expected))
        if not worse({"float32": error, "conditioning": found}, "float32"):
            return found
    low, high = (
        _relevance(subject, model, top, dtype, GradientTimesInput)
        for model, dtype in ((single, torch.float32), (subject.model, torch.float64))
    )
    return max(found, difference(low, high))


@contextmanager
def _shaken(subject: Subject, seed: int) -> Iterator[Subject]:
    """The subject with weights and inputs each moved by as much as single precision may round them.

    They are numbers of single precision, so rounding them again would move nothing: each goes up or down by lot.
    """
    lots = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        up = torch.randint(0, 2, tensor.shape, generator=lots, dtype=torch.uint8).bool()
        return torch.where(up, tensor * (1 + ROUNDING), tensor * (1 - ROUNDING))

    held = [parameter for parameter in subject.model.parameters() if parameter.is_floating_point()]
    before = [tensor.to(torch.float32, copy=True) for tensor in held]  # all that they are, in half the memory
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


def _lrp(flow: str, ledger: bool = False) -> Callable[..., Attribution]:
    return partial(LRP, "attn_lrp", flow=flow, ledger=ledger)


def _relevance(
    subject: Subject, model: nn.Module, top: Tensor, dtype: torch.dtype, method: Callable[..., Attribution]
) -> Tensor:
    """Relevance as :func:`_explained` finds it, without accounts, computed in a precision and handed out in double."""
    with in_precision(dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _explained(subject, model, top, method)[0].double()


def _explained(
    subject: Subject, model: nn.Module, top: Tensor, method: Callable[..., Attribution]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Relevance of all that gets some, ``[batch, ...]`` in a row, and the accounts if the method keeps them."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in subject.values.items()}
    td = TensorDict(values, batch_size=[subject.batch] if subject.batch else [])
    module = TensorDictModule(_answers(subject, model), in_keys=list(values), out_keys=["answer"])
    made = method(
        target=Target("answer", top),
        use_inputs=not subject.sources,
        input_modules=[f"module.model.{path}" for path in subject.sources],
    )
    read = None if subject.sources else [k for k, v in values.items() if v.is_floating_point()]
    # What torch.compile made inside a model runs as the Python that it was written in, as the library asks for.
    with torch.compiler.set_stance("force_eager"), made.prepare(module, in_keys=read) as run:
        done = run(td)
    relevance = [value for _, value in sorted(done["attr"].items(True, True), key=lambda item: str(item[0]))]
    flat = [
        v.detach().reshape(subject.batch or 1, -1) if _rows(v, subject) else v.detach().reshape(1, -1)
        for v in relevance
    ]
    if len({len(v) for v in flat}) > 1:
        flat = [v.reshape(1, -1) for v in flat]
    accounts = (
        {k: done["ledger", k] for k in ("target", "inputs", "absorbed", "gap")}
        if getattr(made, "ledger", False)
        else {}
    )
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
