"""What is private in torch does what is expected of it."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tdhook.relevance.operations import stand_ins
from tdhook.tape import internals


@pytest.fixture(autouse=True)
def in_place():
    """Explained modules that are still alive find what stands in for torch's functions in place afterwards."""
    yield
    stand_ins._replace(ours=bool(stand_ins._ALIVE))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_tensors_inside_transforms():
    found = []

    def function(x):
        inner = internals.inside(x)
        found.append((internals.transformed(), internals.is_batched(x), internals.is_wrapped(x), inner.shape))
        return x

    torch.vmap(function)(torch.zeros(3, 2))
    assert found == [(True, True, True, (3, 2))]
    x = torch.zeros(2)
    assert not internals.transformed() and not internals.is_batched(x) and not internals.is_wrapped(x)


def test_views_and_memory():
    x = torch.zeros(4)
    assert internals.is_view(x[:2]) and not internals.is_view(x)
    assert internals.storage_of(x[:2]) == internals.storage_of(x) != internals.storage_of(x.clone())
    same = []
    torch.vmap(lambda row: same.append(internals.storage_of(row)) or row)(x)
    assert same == [internals.storage_of(x)]


def test_arguments_that_nodes_keep():
    x = torch.zeros(2, 3, requires_grad=True)
    assert internals.argument_kept_by(x.flip(1).grad_fn, "dims") == (1,)
    rows, columns = internals.argument_kept_by(x[:, torch.tensor([1])].grad_fn, "indices")
    assert rows is None and columns.tolist() == [1]
    assert internals.argument_kept_by(x.sin().grad_fn, "dims") is None


def test_nodes_of_the_tape():
    x = torch.zeros(2, 3, requires_grad=True)
    assert internals.maker_of(Doubled.apply(x).grad_fn) is Doubled
    assert internals.maker_of(x.exp().grad_fn) is None
    assert internals.gradients_of(x.sum(0).grad_fn) == [([3], torch.float32)]


@pytest.mark.parametrize("keep", [True, False])
def test_backward_passes_return_what_autograd_does(keep):
    x, other = torch.randn(2, 3, requires_grad=True), torch.ones(1, requires_grad=True)
    z, grad = x.exp(), torch.randn(2, 3)
    expected = torch.autograd.grad([z], [x, other], [grad], retain_graph=True, allow_unused=True)
    found = internals.pulled_back([z], [grad], [x, other], keep=keep)
    assert torch.equal(found[0], expected[0]) and found[1] is None is expected[1]
    assert x.grad is None
    if keep:
        internals.pulled_back([z], [grad], [x], keep=False)
    with pytest.raises(RuntimeError, match="second time"):
        internals.pulled_back([z], [grad], [x], keep=False)


def test_the_stack_of_modes():
    class Mode(TorchFunctionMode):
        pass

    assert internals.top_mode() is None
    with Mode() as mode:
        assert internals.top_mode() is mode
        assert internals.pop_mode() is mode and internals.top_mode() is None
        internals.push_mode(mode)
        assert internals.top_mode() is mode


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_functions():
    def written(x):
        return x + 1

    function = torch.jit.script(written)
    assert internals.written_in_python(function) is written and internals.written_in_python(written) is None
    internals.set_script_call(lambda function, x: "called")
    try:
        assert function(torch.zeros(1)) == "called"
    finally:
        internals.set_script_call(internals.script_call)
    assert function(torch.zeros(1)) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_call_what_is_replaced(reentrant, monkeypatch):
    called = []
    name = "CheckpointFunction" if reentrant else "_checkpoint_without_reentrant_generator"
    own = getattr(internals.CHECKPOINTING, name)

    class Stand:
        apply = staticmethod(lambda *args: called.append(args) or own.apply(*args))

        def __new__(cls, *args, **kwargs):
            called.append(args)
            return own(*args, **kwargs)

    monkeypatch.setattr(internals.CHECKPOINTING, name, Stand)
    x = torch.ones(2, requires_grad=True)
    checkpoint(nn.Tanh(), x, use_reentrant=reentrant).sum().backward()
    assert len(called) == 1


def test_what_nodes_have_noted():
    x = torch.zeros(2, 3, requires_grad=True)
    assert tuple(internals.noted_by((2 * x).view(6).grad_fn, "self_sym_sizes")) == (2, 3)
    assert internals.noted_by(x.transpose(0, -1).grad_fn, "dim1") % 2**64 == 2**64 - 1


def test_tensors_are_saved_as_they_are_within_hooks_that_work_again_afterwards():
    kept, x = [], torch.ones(2, requires_grad=True)
    outer = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(1) or t, lambda t: t)
    inner = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(2) or t, lambda t: t)
    with outer, inner:
        with internals.saving_as_it_is():
            x.exp()
        assert not kept
        x.exp()
    assert kept == [2] and internals.saved_tensors_hooks_on_top() is None


def test_hooks_on_saved_tensors_are_switched_back():
    switch = torch._C._autograd._saved_tensors_hooks_set_tracing
    before = switch(True)
    try:
        with internals.hooks_on_saved_tensors():
            assert switch(False) is False
        assert switch(True) is True
    finally:
        switch(before)


def test_what_compiling_takes():
    script = (
        "from tdhook.tape.internals import mode_options, nonstrict\n"
        "assert mode_options('reduce-overhead', None)['triton.cudagraphs'] is True\n"
        "import torch\n"
        "function = nonstrict(lambda x: x + 1)\n"
        "assert torch.compile(lambda x: function(x), backend='eager', fullgraph=True)(torch.zeros(1)) == 1\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_versions_count_what_is_overwritten() -> None:
    x = torch.zeros(3)
    before = internals.version_of(x)
    x[:1].add_(1)
    assert internals.version_of(x) == before + 1


def test_a_backward_pass_is_told() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(internals.in_backward_pass()))
    x.sum().backward()
    assert seen == [True] and not internals.in_backward_pass()


def test_the_call_of_a_module_is_a_frame_of_the_stack() -> None:
    found = []

    class Looks(nn.Module):
        def forward(self, x):
            frame = sys._getframe()
            while frame is not None:
                found.append(internals.called(frame))
                frame = frame.f_back
            return x

    net = nn.Sequential(Looks())
    net(torch.ones(1))
    assert [module for module in found if module is not None] == [net[0], net]


def test_what_a_module_holds_itself_is_held_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3, affine=False))
    assert internals.children_of(net) == {"0": net[0], "1": net[1]}
    assert internals.parameters_of(net) == {} == internals.buffers_of(net)
    assert internals.parameters_of(net[0]) == {"weight": net[0].weight, "bias": None}
    assert internals.buffers_of(net[1])["running_mean"] is net[1].running_mean
    internals.buffers_of(net[1])["running_mean"] = replaced = torch.ones(3)
    assert net[1].running_mean is replaced


def test_applying_autograd_functions():
    x, seen = torch.ones(2, requires_grad=True), []

    def apply(function, *args):
        seen.append(function)
        return internals.applying_of(function)(*args)

    bound = Doubled.apply  # bound before
    internals.set_applying(apply)
    try:
        assert bound(x).tolist() == [2, 2] and seen == [Doubled]
    finally:
        internals.set_applying(None)
    assert bound(x).tolist() == [2, 2] and seen == [Doubled]


class Batched(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_autograd_functions_in_transforms():
    found, inside = [], []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is not internals.APPLIED_IN_TRANSFORMS:
                return func(*args, **(kwargs or {}))
            found.append(args[0])
            return internals.through_transforms(func, args, kwargs or {})

    def apply(function, *args):
        inside.append(internals.function_inside(function))
        return internals.applying_of(function)(*args)

    internals.set_applying(apply)
    try:
        with Mode():
            made = torch.vmap(Batched.apply)(torch.ones(3, 2, requires_grad=True))
    finally:
        internals.set_applying(None)
    assert made.tolist() == [[2, 2]] * 3 and found == [Batched] and inside == [Batched]
    assert internals.function_inside(Doubled) is Doubled


def test_modes_that_are_on_see_unless_nobody_does():
    class Mode(TorchFunctionMode):
        pass

    low, high = Mode(), Mode()
    assert not internals.sees(low)
    with low, high:
        assert internals.sees(low) and internals.top_mode() is high
        with internals.without_modes():
            assert not internals.sees(low)


def test_operators():
    assert internals.schema_of(torch.ops.aten.add.Tensor).name == "aten::add"
    assert internals.schema_of(torch.add) is None
    add = torch.ops.aten.add
    for operator in (add, add.Tensor):
        assert internals.operator_name(operator) == ("aten", "add")
    assert internals.operator_name(torch.add) is None
    assert internals.is_overloaded(add) and not internals.is_overloaded(add.Tensor)
    assert internals.overload_called(add, (torch.ones(2), torch.ones(2)), {"alpha": 2}) is add.Tensor
    assert internals.overload_called(add, (object(),), {}) is add
    dense = internals.dense_of(torch.ops.higher_order.cond)
    assert dense(True, lambda x: x + 1, lambda x: x, (torch.ones(1),)).item() == 2
    assert internals.dense_of(torch.add) is None


def test_control_flow():
    internals.set_control_flow(lambda own, function, args, kwargs: "ran")
    try:
        assert torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x + 2, (torch.ones(1),)) == "ran"
    finally:
        internals.set_control_flow(None)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_modules():
    module = torch.jit.script(nn.Linear(2, 1))
    assert list(internals.parameters_of(module)) == ["weight", "bias"]
    internals.set_script_method_call(lambda method, x: method.owner._type().name())
    try:
        assert module(torch.ones(1, 2)) == "Linear"
    finally:
        internals.set_script_method_call(internals.script_method_call)
    assert module(torch.ones(1, 2)).shape == (1, 1)


def test_forward_mode_is_loaded_without_a_word() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); from tdhook.tape.internals import load_forward_mode; "
        "load_forward_mode(); import torch; print(torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tensor(1.)" in done.stdout


def test_the_input_that_is_kept_can_be_given_hooks():
    x = torch.randn(2, 3, requires_grad=True)
    z = torch.nn.functional.batch_norm(x, None, None, training=True)
    seen = []
    internals.input_kept_by(z.grad_fn).register_hooks(
        lambda kept: seen.append(kept) or kept, lambda kept: kept
    )
    assert torch.equal(seen[0], x)


def test_what_a_function_puts_on_a_tape_of_its_own_is_told() -> None:
    x = torch.randn(2, 3)
    (kept,) = [
        each for each in internals.saved_by((x * torch.ones(3, requires_grad=True)).grad_fn) if each.data is x
    ]
    assert not internals.begins_tape_inside(kept)
    x.requires_grad = True
    assert internals.begins_tape_inside(kept)


def test_autocast_is_told() -> None:
    assert not internals.autocasting()
    with torch.autocast("cpu", torch.bfloat16):
        assert internals.autocasting()
        with torch.autocast("cpu", enabled=False):
            assert not internals.autocasting()


def test_modules_find_their_hooks_and_those_of_all():
    layer = nn.Linear(2, 2)
    for name, nothing in internals.FINDING_HOOKS.items():
        assert getattr(layer, name)() == nothing
    assert not any(internals.HOOKS_OF_ALL_MODULES)
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        assert any(internals.HOOKS_OF_ALL_MODULES)
        assert len(layer._get_backward_hooks()[0]) == 1
    finally:
        handle.remove()


def test_an_operator_without_a_derivative() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    layer = nn.Linear(4, 3)
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that quantised layers will move
        quantised = torch.ao.nn.quantized.dynamic.Linear.from_float(layer)
        assert internals.is_without_derivative(quantised(x))
    assert not internals.is_without_derivative(layer(x)) and not internals.is_without_derivative(x)


def test_what_a_tensor_is_made_of() -> None:
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    coo, nested = dense.to_sparse(), torch.nested.nested_tensor([dense[:1], dense], layout=torch.jagged)
    assert internals.is_plain(dense) and not internals.is_plain(coo) and not internals.is_plain(nested)
    assert internals.components_of(dense)[0] is dense
    assert [part.tolist() for part in internals.components_of(coo)] == [[[0, 1], [1, 0]], [2.0, 3.0]]
    assert [part.tolist() for part in internals.components_of(nested)] == [
        [0, 1, 3],
        [[0.0, 2.0], [0.0, 2.0], [3.0, 0.0]],
    ]
    assert internals.storage_of(coo) != internals.storage_of(dense.to_sparse())
    assert internals.storage_of(coo) == internals.storage_of(coo.detach())
