"""What is known of a torch function, whatever model calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor

from tdhook.conventions import Convention
from tdhook.relevance.operations.applied import Applied, is_foreign, overwrites_arguments
from tdhook.relevance.operations.own_backward import own_backward
from tdhook.relevance.operations.parts import one_by_one
from tdhook.relevance.operations.readings import Reading
from tdhook.relevance.operations.table import ARITHMETIC
from tdhook.relevance.propagation.binding import Bound
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.rule import Rule
from tdhook.selectors.kinds import ELEMENTWISE, MOVES, PRODUCTS, WINNER
from tdhook.selectors.names import (
    begins_tape,
    hooks,
    initialises,
    name_of,
    out_of_place_form,
    parameters_of,
    queries,
    raw_name,
    reads,
    writes_in_place,
)
from tdhook.tape.as_one import is_one, kept_by
from tdhook.tape.functions import copy_of
from tdhook.tape.internals import is_overloaded, schema_of

__all__ = ["Known", "learned", "on_a_copy"]

_DETACH = ("detach", "data")
_EXPOSES = frozenset(("data", "numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage"))
_DERIVATIVES = (torch.autograd.grad, Tensor.backward)
_BUILT_IN = (BuiltinFunctionType, MethodDescriptorType)
# Their argument is called so.
_HAVE_AXES = frozenset(("fake_quantize_per_channel_affine", "quantize_per_channel", "segment_reduce"))


@dataclass
class Known:
    """What is known of a torch function.

    Attributes:
        operation: its stand-in.
        in_place: whether it overwrites its first argument.
        quick: whether all of its calls merely move data, so that there is nothing to do.
        aside: whether it computes nothing.
        parts: what it does, call by call, if it stands for several calls.
        schema: its signature, of an overload of an operator.
        names: those of its operands, among the first two parameters, as far as torch tells; of others some are by name
            alone, as ``out`` is.
        overloaded: whether it is several operators, of which the arguments tell one.
        refused: whether it overwrites an argument and has a derivative of its own.
        begins_tape: whether it puts a tensor on the tape, and ``differentiates``: whether it runs a backward pass.
        hooks: whether it has a tensor call a hook with its gradient.
        normalises: whether it is what batch norms compute with.
        renames: whether it takes ``dim`` and ``keepdim`` by the names of numpy as well.
        detaches: whether it hands out its argument off the tape, and ``uncounted``: so that torch does not count what
            overwrites it there.
        exposes: whether it hands out the memory of a tensor.
        assigns: whether it puts other values in the place of its argument.
        reads: whether it reads values into Python.
        own: the rule that it has whatever its name.
        selector: what a composite says of it, and ``rule``: with which rule.
        bounds: rules on the operation, by id.
    """

    operation: Operation
    in_place: bool
    quick: bool = False
    aside: bool = False
    parts: Callable[..., Any] | None = None
    schema: Any = None
    names: tuple[str, ...] = ()
    overloaded: bool = False
    refused: bool = False
    begins_tape: bool = False
    differentiates: bool = False
    hooks: bool = False
    normalises: bool = False
    renames: bool = False
    detaches: bool = False
    uncounted: bool = False
    exposes: bool = False
    assigns: bool = False
    reads: bool = False
    own: Rule | None = None
    selector: object = None
    rule: Rule | None = None
    bounds: dict[int, Bound] = field(default_factory=dict)

    def bound(self, rule: Rule, flow: Convention, reading: Reading) -> Bound:
        """A rule on the operation, decided once."""
        found = self.bounds.get(id(rule))
        if found is None:
            found = self.bounds[id(rule)] = reading.bound(rule, self.operation, flow)
        return found


def learned(func: Any) -> Known:
    """What a function itself tells."""
    in_place, schema, own = writes_in_place(func, {}), schema_of(func), _own_rule(func)
    writes = in_place or (schema is not None and schema.is_mutable)
    name = name_of(func)
    form = out_of_place_form(func) or on_a_copy(func) if writes else func
    operation = Operation.of(
        name,
        _apply if isinstance(func, Applied) else form,
        moves=own is None and (name in MOVES or name in WINNER),
        multiplies=own is None and (name in PRODUCTS or name in ELEMENTWISE),
        keeps=kept_by(func),
    )
    known = Known(operation, in_place, own=own, parts=one_by_one(func), schema=schema)
    known.names = tuple(name for name in parameters_of(func)[:2] if name != "out")
    known.begins_tape, known.differentiates = begins_tape(func), func in _DERIVATIVES
    known.refused = own is not None and overwrites_arguments(func)
    known.overloaded = is_overloaded(func)
    known.hooks, known.normalises = hooks(func), func is torch.batch_norm
    known.renames = isinstance(func, _BUILT_IN) and name not in _HAVE_AXES
    known.assigns = name == "data" and raw_name(func) == "__set__"
    known.detaches, known.uncounted = name in _DETACH and not known.assigns, name == "data"
    known.reads = reads(func)
    known.exposes = name in _EXPOSES and not known.assigns
    known.aside = known.begins_tape or known.hooks or known.assigns or queries(func) or initialises(func)
    return known


def _apply(*args: object, **kwargs: object) -> object:
    """Stands for an autograd function, which each call brings along, so that what is known of it does not hold it."""
    raise NotImplementedError("an autograd function is applied by its class")


def _own_rule(function: Any) -> Rule | None:
    """The rule of a function that has one whatever its name."""
    if is_one(function):
        return ARITHMETIC
    return own_backward() if isinstance(function, Applied) or is_foreign(function) else None


def on_a_copy(function: Callable[..., object]) -> Callable[..., Any]:
    """The out-of-place form of a function that overwrites its argument: it overwrites a copy."""

    def form(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        copy = copy_of(x)
        function(copy, *args, **kwargs)
        return copy

    return form
