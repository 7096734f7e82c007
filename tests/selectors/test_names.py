"""One name for each operation, whichever way it is written."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tdhook.relevance.operations.table import OPERATIONS
from tdhook.selectors.names import name_of, out_of_place_form, relabels, writes_in_place


class Names(TorchFunctionMode):
    """Notes which functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append((func, kwargs or {}))
        return func(*args, **(kwargs or {}))


def all_called(f):
    """The functions that arrive at a mode when ``f`` runs, with their keyword arguments."""
    x, y = torch.rand(2, 3, 3, dtype=torch.float64) + 0.5
    with Names() as names:
        f(x, y)
    return names.functions


WAYS = {
    "add": [torch.add, Tensor.add, Tensor.add_, operator.add, operator.iadd, lambda x, y: 1.0 + x],
    "sub": [torch.sub, torch.subtract, Tensor.sub_, operator.sub, operator.isub],
    "mul": [torch.mul, torch.multiply, Tensor.multiply_, operator.mul, operator.imul, lambda x, y: 2 * x],
    "div": [torch.div, torch.true_divide, torch.divide, Tensor.div_, operator.truediv, operator.itruediv],
    "rdiv": [lambda x, y: 2 / x],
    "rsub": [torch.rsub, lambda x, y: 2 - x],
    "rpow": [lambda x, y: 2**x],
    "pow": [torch.pow, Tensor.pow_, operator.pow, operator.ipow],
    "floor_divide": [torch.floor_divide, operator.floordiv, operator.ifloordiv],
    "remainder": [torch.remainder, operator.mod, operator.imod],
    "matmul": [
        torch.matmul,
        torch.mm,
        Tensor.mm,
        operator.matmul,
        operator.imatmul,
        lambda x, y: x[None].bmm(y[None]),
    ],
    "neg": [lambda x, y: -x, lambda x, y: torch.negative(x), lambda x, y: x.neg_()],
    "abs": [lambda x, y: abs(x), lambda x, y: x.absolute(), lambda x, y: x.abs_()],
    "positive": [lambda x, y: +x],
    "getitem": [lambda x, y: x[0], lambda x, y: x[:, 1:], lambda x, y: x[x > 0]],
    "setitem": [lambda x, y: operator.setitem(x, 0, y[0])],
    "T": [lambda x, y: x.T],
    "mT": [lambda x, y: x.mT],
    "real": [lambda x, y: x.real],
    "relu": [
        lambda x, y: F.relu(x),
        lambda x, y: torch.relu(x),
        lambda x, y: F.relu_(x),
        lambda x, y: x.relu_(),
    ],
    "clamp": [
        lambda x, y: x.clamp(0, 1),
        lambda x, y: x.clip(0, 1),
        lambda x, y: x.clip_(0, 1),
        lambda x, y: x.clamp_(0),
    ],
    "sigmoid": [lambda x, y: torch.special.expit(x), lambda x, y: F.sigmoid(x), lambda x, y: x.sigmoid_()],
    "cat": [
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.concat([x, y]),
        lambda x, y: torch.concatenate([x, y]),
    ],
    "transpose": [
        lambda x, y: x.transpose(0, 1),
        lambda x, y: x.swapaxes(0, 1),
        lambda x, y: torch.swapdims(x, 0, 1),
    ],
    "movedim": [lambda x, y: x.movedim(0, 1), lambda x, y: torch.moveaxis(x, 0, 1)],
    "atan2": [torch.atan2, torch.arctan2, Tensor.arctan2_],
    "asin": [lambda x, y: (x / 2).arcsin()],
    "digamma": [lambda x, y: torch.special.psi(x), lambda x, y: x.digamma()],
    "lgamma": [lambda x, y: torch.special.gammaln(x), lambda x, y: x.lgamma_()],
    "log_softmax": [
        lambda x, y: x.log_softmax(-1),
        lambda x, y: F.log_softmax(x, -1),
        lambda x, y: torch.special.log_softmax(x, -1),
    ],
    "softmax": [
        lambda x, y: x.softmax(-1),
        lambda x, y: F.softmax(x, -1),
        lambda x, y: torch.special.softmax(x, -1),
    ],
    "max_pool2d": [
        lambda x, y: F.max_pool2d(x[None], 2),
        lambda x, y: F.max_pool2d(x[None], 2, return_indices=True),
    ],
    "outer": [lambda x, y: torch.outer(x[0], y[0]), lambda x, y: torch.ger(x[0], y[0])],
    "masked_fill": [lambda x, y: x.masked_fill(y > 1, 0.0), lambda x, y: x.masked_fill_(y > 1, 0.0)],
}


@pytest.mark.parametrize("name, way", [(n, w) for n, ways in WAYS.items() for w in ways])
def test_all_ways_of_writing_an_operation_have_one_name(name: str, way) -> None:
    functions = [function for function, _ in all_called(way)]
    assert name in {name_of(function) for function in functions}


@pytest.mark.parametrize("name", sorted(WAYS))
def test_the_table_knows_it(name: str) -> None:
    assert name in OPERATIONS


@pytest.mark.parametrize(
    "written, name",
    [
        ("add", "add"),
        ("torch.add", "add"),
        ("torch.Tensor.add_", "add"),
        ("__iadd__", "add"),
        ("__radd__", "add"),
        ("bmm", "matmul"),
        ("index_put_", "index_put"),
        ("special_erfinv", "erfinv"),
        ("upsample_*", "upsample_*"),
        ("i0", "i0"),
        ("inner", "inner"),
        ("_upsample_bicubic2d_aa", "upsample_bicubic2d_aa"),
    ],
)
def test_names_of_names(written: str, name: str) -> None:
    assert name_of(written) == name
    assert name_of(name) == name


@pytest.mark.parametrize(
    "function", [torch.add, operator.add, Tensor.add_, F.softmax, torch.relu_], ids=lambda f: f.__qualname__
)
def test_a_name_stands_for_itself(function) -> None:
    assert name_of(name_of(function)) == name_of(function)


IN_PLACE = {
    "method": lambda x, y: x.add_(y),
    "operator": lambda x, y: operator.iadd(x, y),
    "setitem": lambda x, y: operator.setitem(x, slice(0, 3), y),
    "torch.relu_": lambda x, y: torch.relu_(x),
    "F.relu_": lambda x, y: F.relu_(x),
    "inplace": lambda x, y: F.relu(x, inplace=True),
    "out": lambda x, y: torch.add(x, y, out=x),
    "index_put_": lambda x, y: x.index_put_((y > 9,), y[0, 0]),
    "transpose_": lambda x, y: x.transpose_(0, 1),
}
NEITHER = {
    "method": lambda x, y: x.add(y),
    "operator": lambda x, y: x + y,
    "not inplace": lambda x, y: F.relu(x, inplace=False),
    "reflected": lambda x, y: 1.0 - x,
    "double underscore": lambda x, y: x.__getitem__(0),
    "out is None": lambda x, y: torch.add(x, y, out=None),
    "requires_grad_": lambda x, y: x.requires_grad_(),
}


@pytest.mark.parametrize("f", IN_PLACE.values(), ids=IN_PLACE)
def test_what_overwrites(f) -> None:
    assert writes_in_place(*all_called(f)[-1])


@pytest.mark.parametrize("f", NEITHER.values(), ids=NEITHER)
def test_what_does_not_overwrite(f) -> None:
    assert not any(writes_in_place(*call) for call in all_called(f))


def test_relabelling_is_no_change_of_values() -> None:
    assert relabels(Tensor.transpose_)
    assert not relabels(Tensor.add_)


@pytest.mark.parametrize(
    "function, arguments",
    [
        (Tensor.add_, (torch.ones(3),)),
        (Tensor.__iadd__, (torch.ones(3),)),
        (Tensor.__imul__, (2.0,)),
        (Tensor.masked_fill_, (torch.tensor([True, False, True]), 0.5)),
        (torch.relu_, ()),
        (F.relu_, ()),
        (F.elu_, (0.5,)),
        (Tensor.clamp_, (-0.1, 0.1)),
        (Tensor.index_add_, (0, torch.tensor([0, 1]), torch.ones(2))),
        (Tensor.scatter_, (0, torch.tensor([1]), torch.ones(1))),
        (Tensor.lerp_, (torch.ones(3), 0.3)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_form_out_of_place_gives_what_the_other_writes(function, arguments) -> None:
    x = torch.tensor([-0.5, 0.2, 0.7])
    before, form = x.clone(), out_of_place_form(function)
    returned = form(x, *arguments)
    assert torch.equal(x, before)
    function(x, *arguments)
    assert torch.equal(returned, x)
    assert not torch.equal(x, before)


@pytest.mark.parametrize(
    "function", [Tensor.bernoulli_, Tensor.__setitem__, Tensor.normal_], ids=lambda f: f.__name__
)
def test_some_have_no_form_out_of_place_or_another(function) -> None:
    form = out_of_place_form(function)
    assert form is None or form is not function
