"""Changes are put back once: by whoever makes them, or at the end of an explanation that was interrupted."""

from __future__ import annotations

from contextvars import ContextVar

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tdhook.tape.internals import function_modes, push_mode, saved_tensors_hooks_on_top
from tdhook.tape.undoing import Change, Undoing, all_of, hooked, lock, set_to, undone, undone_where_raised


class Boom(Exception):
    pass


def failing(*steps):
    """Take some steps in a block, and fail."""
    with Undoing():
        for step in steps:
            step()
        raise Boom


def test_a_change_is_put_back_once():
    undone_so_far = []
    change = Change(lambda: undone_so_far.append(1))
    change.undo()
    change.undo()
    assert undone_so_far == [1]
    with undone(lambda: undone_so_far.append(2)):
        assert undone_so_far == [1]
    assert undone_so_far == [1, 2]


def test_what_is_left_is_undone_where_the_block_raises_the_last_first():
    order = []
    with pytest.raises(Boom):
        failing(*(lambda i=i: Change(lambda: order.append(i)) for i in range(3)))
    assert order == [2, 1, 0]
    with Undoing():
        Change(lambda: order.append("kept"))
    assert order == [2, 1, 0]


def test_blocks_within_blocks_undo_what_is_theirs():
    order = []

    def inner():
        with pytest.raises(Boom):
            failing(lambda: Change(lambda: order.append("inner")))
        assert order == ["inner"]

    with pytest.raises(Boom):
        failing(
            lambda: Change(lambda: order.append("outer")),
            inner,
            lambda: Change(lambda: order.append("after")),
        )
    assert order == ["inner", "after", "outer"]


def test_an_undoing_that_is_interrupted_goes_on():
    order = []

    def interrupted():
        order.append("interrupted")
        if len(order) < 2:
            raise KeyboardInterrupt

    with pytest.raises(Boom):
        failing(lambda: Change(lambda: order.append("first")), lambda: Change(interrupted))
    assert order == ["interrupted", "interrupted", "first"]


def test_modes_hooks_and_locks_are_as_before():
    held = lock()
    with pytest.raises(Boom):
        failing(
            held.acquire,
            lambda: torch.set_grad_enabled(False),
            lambda: push_mode(TorchFunctionMode()),
            torch.autograd.graph.saved_tensors_hooks(abs, abs).__enter__,
            torch._C.DisableTorchFunction().__enter__,
        )
    assert torch.is_grad_enabled() and function_modes() == [] and saved_tensors_hooks_on_top() is None
    with pytest.raises(RuntimeError):
        held.release()


def test_hooks_and_variables_last_as_long_as_the_block():
    layer, variable, seen = nn.Linear(2, 2), ContextVar("variable", default=0), []
    layer.register_forward_hook(lambda *args: None)
    own = dict(layer._forward_hooks)
    before = (layer.register_forward_pre_hook, lambda *args: seen.append("before"), {"with_kwargs": True})
    after = (layer.register_forward_hook, lambda *args: seen.append("after"), {})
    with hooked(before, after), set_to(variable, 1):
        layer(torch.ones(1, 2))
        assert variable.get() == 1
    assert seen == ["before", "after"] and variable.get() == 0
    assert dict(layer._forward_hooks) == own
    assert not layer._forward_pre_hooks and not layer._forward_pre_hooks_with_kwargs


def test_undone_only_where_the_block_raised():
    order = []
    with undone_where_raised(lambda: order.append(1)):
        pass
    assert order == []
    with pytest.raises(Boom), undone_where_raised(lambda: order.append(2)):
        raise Boom
    assert order == [2]


def test_gradients_are_what_they_were_whether_or_not_the_block_raised():
    for on in (True, False):
        with torch.set_grad_enabled(on):
            with Undoing():
                torch.set_grad_enabled(not on)
            assert torch.is_grad_enabled() is on
            with pytest.raises(Boom):
                failing(lambda on=on: torch.set_grad_enabled(not on))
            assert torch.is_grad_enabled() is on


def test_contexts_are_entered_as_far_as_there_are_any():
    first, second = ContextVar("first", default=0), ContextVar("second", default=0)
    with all_of():
        assert (first.get(), second.get()) == (0, 0)
    with all_of(None, set_to(second, 2)):
        assert (first.get(), second.get()) == (0, 2)
    with all_of(set_to(first, 1), None, set_to(second, 2)):
        assert (first.get(), second.get()) == (1, 2)
    assert (first.get(), second.get()) == (0, 0)
