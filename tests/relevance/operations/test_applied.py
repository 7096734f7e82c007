"""Functions with a backward pass of their own: autograd functions and operators of ``torch.library``."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tdhook.rules import EpsilonRule, PassRule
from tdhook.selectors import Op

from .checks import TINY, around, assert_balanced, assert_same, every_flow, explained, plainly, relevance_of


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y**2)


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim):
        ctx.dim, s = dim, x.softmax(dim)
        ctx.save_for_backward(s)
        return s

    @staticmethod
    def backward(ctx, grad):
        (s,) = ctx.saved_tensors
        return s * (grad - (s * grad).sum(ctx.dim, keepdim=True)), None


class Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, y):
        return x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y, grad * x


class Batched(torch.autograd.Function):
    """Says itself what it does in a batch."""

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y**2)

    @staticmethod
    def vmap(info, in_dims, x):
        return Batched.apply(x), in_dims[0]


class WithMask(torch.autograd.Function):
    """Returns a second value, which has no derivative."""

    @staticmethod
    def forward(ctx, x):
        mask = (x > 0).to(x.dtype)
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        return x * mask, mask

    @staticmethod
    def backward(ctx, grad, _):
        (mask,) = ctx.saved_tensors
        return grad * mask


class Overwrites(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@torch.library.custom_op("tdhook_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


twice.register_autograd(lambda ctx, grad: grad * 2)


@torch.library.custom_op("tdhook_tests::softmax", mutates_args=())
def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(output)


def _softmax_backward(ctx, grad):
    (s,) = ctx.saved_tensors
    return s * (grad - (s * grad).sum(-1, keepdim=True))


softmax.register_autograd(_softmax_backward, setup_context=_keep)

tanh = Tanh.apply  # the name by which it is called, long before anything is explained
SAME = {
    "element-wise": (lambda h: tanh(h), torch.tanh),
    "of rows": (lambda h: Softmax.apply(h, -1), lambda h: h.softmax(-1)),
    "of columns": (
        lambda h: Softmax.apply(h[:, None], 1) * h[:, None],
        lambda h: h[:, None].softmax(1) * h[:, None],
    ),
    "product": (lambda h: Product.apply(h, h.roll(1, -1)), lambda h: h * h.roll(1, -1)),
    "square": (lambda h: Product.apply(h, h), lambda h: h * h),
    "in torch.vmap": (lambda h: torch.vmap(Product.apply)(h, h.roll(1, -1)), lambda h: h * h.roll(1, -1)),
    "batched by itself": (torch.vmap(Batched.apply), torch.tanh),
    "beside a mask": (
        lambda h: WithMask.apply(h)[0] + WithMask.apply(h)[1],
        lambda h: h.relu() + (h > 0).to(h.dtype),
    ),
    "operator": (lambda h: twice(h), lambda h: 2 * h),
    "operator of rows": (lambda h: softmax(h), lambda h: h.softmax(-1)),
    "checkpointed": (
        lambda h: checkpoint(lambda x: Softmax.apply(tanh(x), -1), h, use_reentrant=False),
        lambda h: h.tanh().softmax(-1),
    ),
}


@every_flow
@pytest.mark.parametrize("case", SAME)
def test_explained_as_what_it_computes(case: str, flow: str) -> None:
    own, known = SAME[case]
    assert_same(relevance_of(own, flow), relevance_of(known, flow), 1e-9)


@every_flow
def test_a_composite_names_it_like_any_operation(flow: str) -> None:
    composite = [*TINY, (Op("Softmax"), PassRule()), (Op("twice"), PassRule())]
    got = relevance_of(lambda h: twice(Softmax.apply(h, -1)), flow, composite=composite)
    model, x = around(lambda h: h.softmax(-1))
    td, _ = explained(model, x, flow, [*TINY, (Op("softmax"), PassRule())])
    assert_same(got, 2 * td["attr", "input"], 1e-6)


class Inside(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) + 1


@every_flow
@pytest.mark.parametrize("function", [tanh, twice], ids=["function", "operator"])
def test_what_a_unit_keeps_around_it_is_accounted_for(function, flow: str) -> None:
    model, x = around(Inside(function))
    td, module = explained(model, x, flow, [(Inside, EpsilonRule(1e-12)), *TINY])
    assert_balanced(td, module)
    assert td["ledger", "absorbed"].abs().min() > 0.01


@pytest.mark.parametrize("how", ["function", "operator"])
def test_what_overwrites_an_argument_is_refused(how: str) -> None:
    model, x = around(lambda h: Overwrites.apply(h.clone()))
    message = r"`Overwrites` overwrites an argument.*give the module `\(model\)`.*a rule, EpsilonRule say"
    if how == "operator":
        overwriting = torch.library.custom_op(
            "tdhook_tests::overwriting",
            lambda x: x.mul_(2) and None,
            mutates_args={"x"},
            schema="(Tensor(a!) x) -> ()",
        )

        def f(h: Tensor) -> Tensor:
            copy = h.detach() if not h.requires_grad else h * 1
            overwriting(copy)
            return copy

        model.f, message = f, message.replace("Overwrites", "overwriting")
    with pytest.raises(NotImplementedError, match=message):
        explained(model, x, "relevance")


def test_a_function_runs_once_and_its_random_numbers_are_drawn_once() -> None:
    calls = []

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append(torch.rand(()).item())
            return x * (1 + calls[-1])

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + calls[-1])

    model, x = around(Noisy.apply)
    calls.clear()
    td, _ = explained(model, x, "relevance", ledger=False)
    assert len(calls) == 1
    assert torch.equal(td["output"], plainly(model, x))
    assert torch.rand(()).item() != calls[-1]


def test_nothing_of_torch_stays_replaced_and_no_class_is_held() -> None:
    class Local(Tanh):
        pass

    gc.collect()  # as long as something is explained, other functions stand in
    apply = torch.autograd.Function.__mro__[1].__dict__.get("apply")
    model, x = around(Local.apply)
    _, module = explained(model, x, "relevance", ledger=False)
    gone = weakref.ref(Local)
    del Local, model, module
    gc.collect()
    assert gone() is None
    assert torch.autograd.Function.__mro__[1].__dict__.get("apply") is apply


class Recomputing(torch.autograd.Function):
    """Softmax, found once more in the backward pass, which puts what it has kept on a tape of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.detach())
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        x.requires_grad = True
        with torch.enable_grad():
            x.softmax(-1).backward(grad)
        found, x.grad = x.grad, None
        return found + 0.0


@every_flow
def test_a_function_that_computes_once_more_in_its_backward_pass(flow: str) -> None:
    found = []
    for function in (lambda h: Softmax.apply(h, -1), Recomputing.apply):
        td, module = explained(*around(function), flow)
        assert_balanced(td, module)
        found.append(td["attr", "input"])
    assert_same(*found)


class Either(torch.autograd.Function):
    """One function or another, as a word says."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        y = x**2 if how == "square" else x.softmax(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        if ctx.how == "square":
            return 2 * x * grad, None
        return y * (grad - (y * grad).sum(-1, keepdim=True)), None


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Overflows(torch.autograd.Function):
    """Each value gets what overflows from its neighbour, if anything does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + (x.roll(1, -1) - 1).relu()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad + ((x.roll(1, -1) > 1) * grad).roll(-1, -1)


class Overflowing(Overflows):
    """The same, of which nothing was learned by a call before."""


@every_flow
@pytest.mark.parametrize("order", [("square", "softmax"), ("softmax", "square")])
def test_a_word_that_says_what_a_function_does(order, flow):
    apart = {"square": Square.apply, "softmax": lambda h: Softmax.apply(h, -1)}
    one, other = order
    wanted = relevance_of(lambda h: apart[other](apart[one](h)), flow)
    assert_same(relevance_of(lambda h: Either.apply(Either.apply(h, one), other), flow), wanted, 1e-9)


@every_flow
def test_that_one_is_element_wise_may_hold_for_some_values_alone(flow):
    def twice(second):
        return lambda h: second(3 + Overflows.apply(h.tanh()))

    assert_same(
        relevance_of(twice(Overflows.apply), flow), relevance_of(twice(Overflowing.apply), flow), 1e-9
    )


@every_flow
@pytest.mark.parametrize("constant_first", [False, True])
def test_a_product_with_a_constant_is_none_of_two_activations(constant_first, flow):
    weight = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).expand(3, 6)

    def computed(product):
        def function(h):
            once = product(h, weight) if constant_first else product(h, h.roll(1, -1))
            return product(once, h.roll(1, -1)) if constant_first else product(once, weight)

        return function

    wanted = relevance_of(computed(torch.mul), flow)
    assert_same(relevance_of(computed(Product.apply), flow), wanted, 1e-9)


@every_flow
def test_whole_numbers_beside_values(flow):
    class Picks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            values, places = x.topk(2, -1)
            ctx.mark_non_differentiable(places)
            ctx.save_for_backward(places)
            ctx.shape = x.shape
            return values, places

        @staticmethod
        def backward(ctx, grad, _):
            return grad.new_zeros(ctx.shape).scatter(-1, ctx.saved_tensors[0], grad)

    wanted = relevance_of(lambda h: h.topk(2, -1)[0], flow)
    assert_same(relevance_of(lambda h: Picks.apply(h)[0], flow), wanted, 1e-9)


class RunsAgain(torch.autograd.Function):
    """A layer that is run again in the backward pass, as reversible layers and adjoint methods do."""

    @staticmethod
    def forward(ctx, layer, x, *parameters):
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)
        return layer(x)

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.layer(x)
        return None, *torch.autograd.grad(y, (x, *parameters), grad)


class InItsBackwardPass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return RunsAgain.apply(self.layer, x, *self.layer.parameters())


@every_flow
@pytest.mark.parametrize("composite", [TINY, "epsilon_plus"], ids=["epsilon", "preset"])
def test_layers_that_run_again_in_a_backward_pass_have_no_rules_there(composite, flow: str) -> None:
    """Nor are the parameters, with respect to which it differentiates, taken off the tape."""
    model, x = around(InItsBackwardPass().double())
    td, module = explained(model, x, flow, composite)
    assert_balanced(td, module)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    assert_same(td["attr", "input"], leaf * grad, 1e-4)


class InItsForwardPass(torch.autograd.Function):
    """``x`` and the derivative of a layer there, as flows have it that keep the trace of a Jacobian matrix."""

    @staticmethod
    def forward(ctx, layer, x):
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(layer(at).sum(), at)
        return x + slope

    @staticmethod
    def backward(ctx, grad):
        return None, grad


@every_flow
def test_layers_that_are_differentiated_in_a_forward_pass_have_no_rules_there(flow: str) -> None:
    layer = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)).double()

    class Sloped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return InItsForwardPass.apply(self.layer, x)

    model, x = around(Sloped())
    td, module = explained(model, x, flow, "epsilon_plus")
    assert_balanced(td, module)
    assert torch.equal(td["output"], plainly(model, x))


def test_a_function_that_differentiates_what_it_closes_over_is_named() -> None:
    def closing(h: Tensor) -> Tensor:
        scale = h.tanh()
        return RunsAgain.apply(lambda x: x * scale, h, scale)

    model, x = around(closing)
    message = "`RunsAgain` differentiates in its backward pass.*closes over others; give the module"
    with pytest.raises(RuntimeError, match=message):
        explained(model, x, "gradient")
