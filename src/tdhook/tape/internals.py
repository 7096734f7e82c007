"""Internals: all that is private in torch and used here, each under a name of ours.

The upper bound on torch in ``pyproject.toml`` follows from this file: with a new release, its tests say what moved.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from importlib import import_module
from operator import methodcaller
from types import FrameType
from typing import Any, TypeAlias, TypeVar

import torch
import torch.autograd.function as autograd_functions
import torch.utils.checkpoint as checkpointing
from torch import _C, Tensor, nn
from torch._C import _autograd, _functorch
from torch._functorch import autograd_function, pyfunctorch
from torch._higher_order_ops import utils as higher_order
from torch._library.custom_ops import CustomOpDef
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

__all__ = [
    "APPLIED_IN_TRANSFORMS",
    "CHECKPOINTING",
    "FINDING_HOOKS",
    "HOOKS_OF_ALL_MODULES",
    "applying_of",
    "argument_kept_by",
    "attention_in_parts",
    "autocasting",
    "base_of",
    "begins_tape_inside",
    "buffers_of",
    "called",
    "children_of",
    "components_of",
    "dense_of",
    "function_inside",
    "function_modes",
    "gradients_of",
    "hook_tables_of",
    "hooks_on_saved_tensors",
    "in_backward_pass",
    "input_kept_by",
    "inside",
    "is_batched",
    "is_overloaded",
    "is_plain",
    "is_view",
    "is_without_derivative",
    "is_wrapped",
    "load_forward_mode",
    "maker_of",
    "mode_options",
    "nodes_made",
    "nonstrict",
    "noted_by",
    "number_of",
    "operator_name",
    "overload_called",
    "parameters_of",
    "pop_mode",
    "pulled_back",
    "push_mode",
    "saved_by",
    "saved_tensors_hooks_on_top",
    "saving_as_it_is",
    "schema_of",
    "script_call",
    "script_method_call",
    "sees",
    "set_applying",
    "set_control_flow",
    "set_function_modes",
    "set_script_call",
    "set_script_method_call",
    "set_torch_functions_seen",
    "storage_of",
    "through_transforms",
    "told_when_compiling",
    "top_mode",
    "torch_functions_seen",
    "transformed",
    "version_of",
    "warn_of_loops",
    "without_modes",
    "without_saved_tensors_hooks",
    "written_in_python",
]

V = TypeVar("V")
F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")

transformed: Callable[[], bool] = _C._are_functorch_transforms_active
"""Whether a transform such as ``torch.vmap`` is at work."""

is_batched: Callable[[Tensor], bool] = _functorch.is_batchedtensor
"""Whether ``torch.vmap`` wrapped a tensor."""

is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
"""Whether any transform wrapped a tensor."""

inside: Callable[[Tensor], Tensor] = _functorch.get_unwrapped
"""The tensor that a transform wrapped."""


warn_of_loops: Callable[[bool], None] = _functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
"""Set whether ``torch.vmap`` warns of functions that it loops over, which it does unless told."""


@cache
def load_forward_mode() -> None:
    """Import what forward-mode derivatives need, which warns of functions that torch itself deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("torch._decomp.decompositions_for_jvp")


attention_in_parts: Callable[..., tuple[Tensor, Tensor]] = torch._scaled_dot_product_attention_math
"""Attention without a fused kernel: its values and its weights."""

HOOKS_OF_ALL_MODULES: tuple[Mapping[int, object], ...] = (
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)
"""Backward hooks that are called for each module there is."""

FINDING_HOOKS: Mapping[str, Any] = {"_get_backward_hooks": ([], []), "_get_backward_pre_hooks": []}
"""How a module finds backward hooks, its own and those of all: methods, and what they find where there are none."""

without_modes: Callable[[], AbstractContextManager[None]] = _C.DisableTorchFunction
"""Runs torch functions in sight of no mode."""


is_view: Callable[[Tensor], bool] = Tensor._is_view
"""Whether a tensor is a view of another one."""


def base_of(x: Tensor) -> Tensor:
    """The tensor that a tensor is a view of, or itself."""
    with without_modes():
        base = x._base
    return x if base is None else base


def version_of(x: Tensor) -> int:
    """How often a tensor, or one of the same memory, was overwritten."""
    return x._version


autocasting: Callable[[], bool] = _C._is_any_autocast_enabled
"""Whether autocast is on, for any kind of device."""


def in_backward_pass() -> bool:
    """Whether this thread runs a part of a backward pass, which may be that of another thread."""
    return bool(_C._current_graph_task_id() != -1)


def called(frame: FrameType) -> nn.Module | None:
    """The module whose call a frame of the stack is, if it is one."""
    return frame.f_locals["self"] if frame.f_code is _CALL else None


_CALL = nn.Module._call_impl.__code__


def is_plain(x: Tensor) -> bool:
    """Whether a tensor has an element at each place of its shape, and its memory holds those."""
    return x.layout is torch.strided and not x.is_nested


def components_of(x: Tensor) -> tuple[Tensor, ...]:
    """What a tensor holds: itself, or if it is sparse or nested, the tensors that it is made of, its values last."""
    if is_plain(x):
        return (x,)
    if x.is_nested:
        nested: Any = x
        return (nested.offsets(), nested.values()) if x.layout is torch.jagged else tuple(x.unbind())
    if x.is_mkldnn:
        return (x.to_dense(),)
    if x.layout is torch.sparse_coo:
        return x._indices(), x._values()
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return x.crow_indices(), x.col_indices(), x.values()
    return x.ccol_indices(), x.row_indices(), x.values()


def is_without_derivative(result: object) -> bool:
    """Whether a function of what is on the tape returned a tensor that torch only pretends to differentiate."""
    node = result.grad_fn if isinstance(result, Tensor) else None
    return node is not None and node.name() == "torch::autograd::WarnNotImplemented"


def storage_of(x: Tensor) -> int:
    """What tells the memory of a tensor from that of others."""
    while is_wrapped(x):
        x = inside(x)
    return int(components_of(x)[-1].untyped_storage()._cdata)


nodes_made: Callable[[], int] = _autograd._get_sequence_nr
"""How many nodes this thread has put on the tape so far."""


number_of: Callable[[object], int] = methodcaller("_sequence_nr")
"""The number of a node of the tape among those of its thread, in the order in which they were made."""


def maker_of(node: object) -> type | None:
    """The class of the function that made a node of the tape, if it was written in Python."""
    return getattr(type(node), "_forward_cls", None)


def gradients_of(node: Any) -> list[tuple[Sequence[int], torch.dtype]]:
    """Shape and dtype of each gradient that a node of the tape is given."""
    return [(meta.shape, meta.dtype) for meta in node._input_metadata]


def pulled_back(
    tensors: Sequence[Tensor], grads: Sequence[Tensor], sources: Sequence[Tensor], *, keep: bool
) -> Sequence[Tensor | None]:
    """What ``torch.autograd.grad`` returns, which looks at shapes and types before: here they are known to fit."""
    found: Sequence[Tensor | None] = torch.autograd.graph._engine_run_backward(
        tuple(tensors),
        tuple(grads),
        keep,
        False,
        tuple(sources),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


def saved_by(node: object) -> Iterator[Any]:
    """What a node of the tape keeps for the backward pass: each can be given hooks (``register_hooks``)."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            kept = getattr(node, name)
            yield from kept if isinstance(kept, tuple | list) else (kept,)


def begins_tape_inside(kept: Any) -> bool:
    """Whether what a node keeps was put on the tape by its function, which differentiates in its backward pass.

    Where it is given hooks, torch hands out another tensor for it each time, and what arrives at that is lost.
    """
    x = getattr(kept, "data", None)
    return type(x) is Tensor and x.requires_grad and x.is_leaf


def argument_kept_by(node: Any, name: str) -> Any:
    """What a node keeps of an argument of the operation that made it; ``None`` if nothing of that name."""
    return getattr(node, f"_saved_{name}", None)


def input_kept_by(node: Any) -> Any:
    """What a node keeps of the first argument of the operation that made it; it can be given hooks."""
    return node._raw_saved_input


_modes_on: Callable[[], int] = _C._len_torch_function_stack
_mode_at: Callable[[int], TorchFunctionMode] = _C._get_function_stack_at


def top_mode() -> TorchFunctionMode | None:
    """The mode that sees torch functions first, if any."""
    count = _modes_on()
    return _mode_at(count - 1) if count else None


pop_mode: Callable[[], TorchFunctionMode] = _C._pop_torch_function_stack
"""Take the uppermost mode off."""

push_mode: Callable[[TorchFunctionMode], None] = _C._push_on_torch_function_stack
"""Put a mode on top."""


def function_modes() -> list[TorchFunctionMode]:
    """The modes that see torch functions, the one that sees them last first."""
    count = _modes_on()
    return [*map(_mode_at, range(count))] if count else []


def set_function_modes(modes: Sequence[TorchFunctionMode]) -> None:
    """Have these modes see torch functions, and no others."""
    if function_modes() != modes:
        while _modes_on():
            pop_mode()
        for mode in modes:
            push_mode(mode)


torch_functions_seen: Callable[[], Any] = _C._get_torch_function_state  # type: ignore[attr-defined]
"""Who sees torch functions at all: modes and subclasses of tensors, one of the two, or nobody."""

set_torch_functions_seen: Callable[[Any], None] = _C._set_torch_function_state  # type: ignore[attr-defined]
"""Set who sees torch functions."""


Hooks: TypeAlias = "tuple[Callable[[Tensor], object], Callable[[Any], Tensor]]"

saved_tensors_hooks_on_top: Callable[[], Hooks | None] = partial(
    _autograd._top_saved_tensors_default_hooks, True
)
"""The pair of hooks on saved tensors that is at work, if any."""


def noted_by(node: Any, name: str) -> Any:
    """What a node of torch's own has noted under a name, no tensor; axes that were negative are large numbers."""
    return getattr(node, f"_saved_{name}")


@contextmanager
def saving_as_it_is() -> Iterator[None]:
    """Save tensors as they are, whatever hooks are at work outside, those of a checkpointed block say.

    They are taken off meanwhile: hooks that return what they are given would hold a tape for ever, which second
    derivatives refer to from what they save.
    """
    off: list[Hooks] = []
    try:
        while (pair := saved_tensors_hooks_on_top()) is not None:
            off.append(pair)
            _autograd._pop_saved_tensors_default_hooks()
        yield
    finally:
        for pack, unpack in reversed(off):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)


def without_saved_tensors_hooks(top: object) -> None:
    """Take pairs of hooks on saved tensors off until that one is at work."""
    while (found := saved_tensors_hooks_on_top()) is not None and found != top:
        _autograd._pop_saved_tensors_default_hooks()


def sees(mode: TorchFunctionMode) -> bool:
    """Whether a mode is on and sees torch functions, above or below others."""
    if not _C._is_torch_function_mode_enabled():
        return False
    return any(_mode_at(i) is mode for i in range(_modes_on()))


_Function: Any = autograd_functions._SingleLevelFunction


def applying_of(function: Any) -> Callable[..., Any]:
    """How torch applies an autograd function where no transform is at work."""
    apply: Callable[..., Any] = super(_Function, function).apply
    return apply


def set_applying(apply: Callable[..., object] | None) -> None:
    """Have autograd functions applied by ``apply(function, *args)``, or by torch again."""
    if apply is not None:
        _Function.apply = classmethod(apply)
    elif "apply" in _Function.__dict__:
        del _Function.apply


def function_inside(function: type) -> type:
    """The autograd function that ``torch.vmap`` made another one of, or the function itself."""
    if function.__module__ != "torch._functorch.autograd_function":
        return function
    cells = getattr(function.__dict__["forward"].__func__, "__closure__", None) or ()
    kinds = (cell.cell_contents for cell in cells if isinstance(cell.cell_contents, type))
    return next((kind for kind in kinds if issubclass(kind, torch.autograd.Function)), function)


APPLIED_IN_TRANSFORMS: Any = autograd_function.custom_function_call
"""The operator by which autograd functions are applied within ``torch.vmap`` and its kin."""

through_transforms: Callable[[Any, Any, Any], Any] = pyfunctorch.dispatch_functorch
"""Calls an operator within a transform, given its arguments as a tuple and a dictionary."""


def dense_of(function: object) -> Callable[..., Any] | None:
    """What an operator that takes functions (``torch.cond``, a scan) does on tensors, in Python."""
    if not isinstance(function, HigherOrderOperator):
        return None
    kernel: Callable[..., Any] | None = function.py_kernels.get(_C.DispatchKey.CompositeExplicitAutograd)
    return kernel


_CONTROL_FLOW: Any = higher_order
_control_flow = _CONTROL_FLOW._hop_compile_and_call


def set_control_flow(
    run: Callable[[Callable[..., Any], Callable[..., object], Any, Any], object] | None,
) -> None:
    """Have operators that take functions run by ``run(torch's way, function, args, kwargs)``, or by torch again."""

    def call(function: Callable[..., object], args: Any, kwargs: Any = None) -> object:
        assert run is not None
        return run(_control_flow, function, args, kwargs or {})

    _CONTROL_FLOW._hop_compile_and_call = _control_flow if run is None else call


def schema_of(function: object) -> Any:
    """The signature of one overload of an operator, as torch's dispatcher knows it; ``None`` for other functions."""
    return function._schema if isinstance(function, OpOverload) else None


def is_overloaded(function: object) -> bool:
    """Whether a function is an operator that is called without saying which of its overloads is meant."""
    return isinstance(function, OpOverloadPacket)


def overload_called(function: Any, args: Any, kwargs: Any) -> Any:
    """The overload of an operator that a call means; the operator itself where these are no arguments of any."""
    try:
        name = _C._jit_resolve_packet(function._qualified_op_name, *args, **kwargs)
    except RuntimeError:
        return function
    return getattr(function, name, function)


def operator_name(function: object) -> tuple[str, str] | None:
    """Of which library an operator is, and its name there; ``None`` for other functions."""
    if isinstance(function, CustomOpDef):
        return function._namespace, function._name
    if isinstance(function, OpOverload | OpOverloadPacket):
        packet: Any = function.overloadpacket if isinstance(function, OpOverload) else function
        library, _, name = packet._qualified_op_name.partition("::")
        return library, name
    return None


script_method_call: Any = _C.ScriptMethod.__dict__["__call__"]
"""How methods of modules compiled by ``torch.jit`` are called."""


def set_script_method_call(call: object) -> None:
    """Have methods of modules compiled by ``torch.jit`` called in another way."""
    kind: Any = _C.ScriptMethod
    kind.__call__ = call


script_call: Any = _C.ScriptFunction.__dict__["__call__"]
"""How functions compiled by ``torch.jit.script`` are called."""


def set_script_call(call: object) -> None:
    """Have functions compiled by ``torch.jit.script`` called in another way."""
    kind: Any = _C.ScriptFunction
    kind.__call__ = call


def told_when_compiling(function: Callable[[str], None]) -> None:
    """Have a function called, with the name of what it is, before ``torch.compile`` compiles anything, in any thread.

    Nothing happens where nobody has imported what compiles.
    """
    if "torch._dynamo.callback" not in sys.modules:
        return
    handler = sys.modules["torch._dynamo.callback"].callback_handler
    if all(getattr(known, "tells", None) is not function for known in handler.start_callbacks):

        def tell(arguments: object) -> None:
            function(_about_to_be_compiled())

        tell.tells = function  # type: ignore[attr-defined]
        handler.register_start_callback(tell)


def _about_to_be_compiled() -> str:
    """The name of the function that ``torch.compile`` looks at, up the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = getattr(frame.f_locals.get("frame"), "f_code", None)
        if code is not None and frame.f_code.co_filename.endswith("convert_frame.py"):
            return str(code.co_name)
        frame = frame.f_back
    return "a function"


def written_in_python(function: object) -> Callable[..., object] | None:
    """The Python that a function compiled by ``torch.jit.script`` was written in."""
    return getattr(function, "_torchdynamo_inline", None)


CHECKPOINTING: Any = checkpointing
"""The module of ``torch.utils.checkpoint``, whose ``CheckpointFunction`` and
``_checkpoint_without_reentrant_generator`` do its work."""


@contextmanager
def hooks_on_saved_tensors() -> Iterator[None]:
    """Let hooks on saved tensors run while a graph is traced, instead of putting them off until the graph runs."""
    set_tracing = _autograd._saved_tensors_hooks_set_tracing
    put_off = set_tracing(False)
    try:
        yield
    finally:
        set_tracing(put_off)


def nonstrict(function: F) -> F:
    """Have ``torch.compile`` take a function for one of tensors, and not look into it."""
    from torch._dynamo import nonstrict_trace  # takes a second, and only those wait for it who compile

    return nonstrict_trace(function)  # type: ignore[return-value]


def mode_options(mode: str, dynamic: bool | None) -> dict[str, object]:
    """The options of Inductor that a mode of ``torch.compile`` stands for."""
    from torch._inductor import list_mode_options  # likewise

    return list_mode_options(mode, dynamic)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module holds itself, by their names: the dictionary that it keeps them in."""
    return _dictionary(module._parameters)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that a module holds itself, by their names: the dictionary that it keeps them in."""
    return _dictionary(module._buffers)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module holds itself, by their names: the dictionary that it keeps them in."""
    return _dictionary(module._modules)


def _dictionary(registry: Mapping[str, V]) -> dict[str, V]:
    """A registry itself, or a copy of that of a module compiled by ``torch.jit``, which is none."""
    return registry if isinstance(registry, dict) else dict(registry.items())


def hook_tables_of(
    module: nn.Module,
) -> tuple[Sequence[dict[int, Callable[..., object]]], Sequence[dict[int, bool]]]:
    """The hooks of a module's calls by number, and what is marked of them, likewise."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    marks = (
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    )
    return hooks, marks
