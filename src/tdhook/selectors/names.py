"""One name for each operation, however it is written: function, method, operator, in place or not."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tdhook.tape.as_one import is_one
from tdhook.tape.internals import operator_name

__all__ = [
    "TORCH",
    "hooks",
    "initialises",
    "name_of",
    "out_of_place_form",
    "parameters_of",
    "queries",
    "raw_name",
    "reads",
    "relabels",
    "told_apart",
    "writes_in_place",
]

TORCH = frozenset(("aten", "prim", "prims"))
"""Where operators of torch itself are."""

_SYNONYMS = {
    "absolute": "abs",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctan2": "atan2",
    "arctanh": "atanh",
    "clip": "clamp",
    "clip_": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "expit": "sigmoid",
    "floordiv": "floor_divide",
    "gammaln": "lgamma",
    "ger": "outer",
    "idiv": "div",
    "imatmul": "matmul",
    "log_sigmoid": "logsigmoid",
    "mm": "matmul",
    "bmm": "matmul",
    "moveaxis": "movedim",
    "mod": "remainder",
    "multiply": "mul",
    "constant_pad_nd": "pad",
    "lift_fresh": "alias",
    "linalg_matmul": "matmul",
    "matrix_H": "mH",
    "negative": "neg",
    "reflection_pad1d": "pad",
    "reflection_pad2d": "pad",
    "reflection_pad3d": "pad",
    "replication_pad1d": "pad",
    "replication_pad2d": "pad",
    "replication_pad3d": "pad",
    "unsafe_index": "index",
    "unsafe_view": "view",
    "numpy_T": "T",
    "prelu_kernel": "prelu",
    "psi": "digamma",
    "radd": "add",
    "rmul": "mul",
    "rtruediv": "rdiv",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
    "truediv": "div",
}
_RELABEL = ("as_strided_", "detach_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_")
_QUERIES = frozenset(
    [
        "__len__",
        "_base",
        "_is_view",
        "_version",
        "data_ptr",
        "device",
        "dim",
        "dtype",
        "element_size",
        "get_device",
        "grad_fn",
        "is_complex",
        "is_contiguous",
        "is_cpu",
        "is_cuda",
        "is_floating_point",
        "is_inference",
        "is_leaf",
        "is_mkldnn",
        "is_nested",
        "is_quantized",
        "is_shared",
        "is_sparse",
        "itemsize",
        "layout",
        "names",
        "nbytes",
        "ndim",
        "ndimension",
        "nelement",
        "numel",
        "requires_grad",
        "shape",
        "size",
        "storage_offset",
        "stride",
    ]
)
_READS = frozenset(
    ("__bool__", "__contains__", "__index__", "__int__", "allclose", "equal", "is_nonzero", "item", "tolist")
)
_IN_PLACE_OPERATORS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul")


def name_of(function: Callable[..., object] | str) -> str:
    """The name of the operation that a torch function, method, operator or property getter performs.

    ``torch.add``, ``torch.Tensor.add_``, ``operator.iadd``, ``torch.ops.aten.add.Tensor`` and ``"add"`` are all
    ``"add"``; ``torch.mm``, ``torch.bmm`` and ``@`` are ``"matmul"``. An operator of another library, an autograd
    function and what :func:`~tdhook.targets.as_one` decorates have names of their own, ``"library::add"`` where torch
    has one of that name.
    """
    if isinstance(function, str):
        return _plain(function.rpartition(".")[2])
    operator, owner = operator_name(function), getattr(function, "__self__", None)
    if operator is not None:
        library, name = operator
        return _plain(name) if library in TORCH else told_apart(library, name)
    name = raw_name(function) or type(function).__name__
    if is_one(function):
        return told_apart(function.__module__, name)
    if name == "apply" and isinstance(owner, type) and issubclass(owner, Function):
        return told_apart(owner.__module__, owner.__name__)
    if name in ("__get__", "__set__", "__delete__"):  # a property of torch.Tensor
        name = getattr(owner, "__name__", name)
    return _plain(name)


def told_apart(owner: str, name: str) -> str:
    """The name of what is none of torch's: where torch has one of that name, with the module or library it is of."""
    name = _plain(name)
    return f"{owner.rpartition('.')[2]}::{name}" if name in _of_torch() else name


@cache
def _of_torch() -> frozenset[str]:
    return frozenset(map(_plain, {*dir(torch), *dir(F), *dir(Tensor)}))


def _plain(name: str) -> str:
    """The name of what is written in several ways."""
    name = name.strip("_") if name.startswith("__") else name.rstrip("_").lstrip("_")
    if name[:1] == "i" and name[1:] in _IN_PLACE_OPERATORS:
        name = name[1:]
    name = name.removesuffix("_with_indices").removeprefix("special_")
    if name.endswith("_copy") and name != "index_copy":  # operators that return no views: view_copy, to_copy
        name = name.removesuffix("_copy")
    return _SYNONYMS.get(name, name)


def raw_name(function: Callable[..., object]) -> str:
    """The name of a function; of an overload of an operator, ``add.Tensor`` say, that of the operator."""
    return str(getattr(function, "__name__", "")).partition(".")[0]


def parameters_of(function: Callable[..., object]) -> tuple[str, ...]:
    """The names of a torch function's parameters, in order, as far as torch tells."""
    example = torch.overrides.get_testing_overrides().get(function)
    code = getattr(example, "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount]


def writes_in_place(function: Callable[..., object], kwargs: dict[str, object]) -> bool:
    """Whether a call overwrites its first argument, or its ``out``."""
    name = raw_name(function)
    if name in ("requires_grad_", "share_memory_"):
        return False
    if name.startswith("__"):
        return name in ("__setitem__", *(f"__i{operator}__" for operator in _IN_PLACE_OPERATORS))
    in_place = name.endswith("_")
    return in_place or kwargs.get("inplace") is True or kwargs.get("out") is not None


def queries(function: Callable[..., object]) -> bool:
    """Whether a function merely tells something of a tensor: a property such as ``shape``, a method such as ``dim``."""
    name = raw_name(function)
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "") in _QUERIES
    return name in _QUERIES


def reads(function: Callable[..., object]) -> bool:
    """Whether a function reads values of a tensor into Python."""
    return raw_name(function) in _READS


def begins_tape(function: Callable[..., object]) -> bool:
    """Whether a function puts a tensor on the tape, or takes it off."""
    name = raw_name(function)
    owner = getattr(getattr(function, "__self__", None), "__name__", "")
    return name == "requires_grad_" or (name == "__set__" and owner == "requires_grad")


def hooks(function: Callable[..., object]) -> bool:
    """Whether a function has a tensor call a hook with its gradient."""
    return raw_name(function) == "register_hook"


def initialises(function: Callable[..., object]) -> bool:
    """Whether a function fills a new parameter, as layers do that a model makes on its way: off the tape."""
    return getattr(function, "__module__", None) == "torch.nn.init"


def relabels(function: Callable[..., object]) -> bool:
    """Whether a function in place changes the shape of a tensor, or its history, and leaves its values alone."""
    return raw_name(function) in _RELABEL


def out_of_place_form(function: Callable[..., object]) -> Callable[..., object] | None:
    """The function that returns what an in-place one writes: ``torch.Tensor.add`` for ``torch.Tensor.add_``."""
    name = raw_name(function)
    bare = f"__{name[3:]}" if name.startswith("__i") else name.rstrip("_")
    homes: tuple[object, ...] = (torch.Tensor, torch, F)
    space = getattr(function, "__module__", None) or ""
    if space.startswith("torch._ops."):
        homes = (getattr(torch.ops, space.removeprefix("torch._ops.")),)
    elif isinstance(function, types.FunctionType | types.BuiltinFunctionType) and not name.startswith("__"):
        homes = (F, torch, torch.Tensor)
    for home in homes:
        found = getattr(home, bare, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    return None
