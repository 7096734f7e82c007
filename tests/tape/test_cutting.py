"""What outlives a graph is taken off it, wherever it is kept."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from tdhook.tape.cutting import Graph
from tdhook.tape.dependence import leaf


def begun() -> tuple[Graph, Tensor]:
    graph, x = Graph(), leaf(torch.randn(3, 4))
    graph.grows_from([x])
    return graph, x


def test_a_graph_lives_as_long_as_what_is_on_it() -> None:
    graph, x = begun()
    y = (x * 2).tanh()
    del x
    assert graph.alive
    del y
    assert not graph.alive


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("keep", [lambda y: y, lambda y: y.chunk(2, -1)[0], lambda y: (y[0],)])
def test_what_is_kept_is_taken_off(keep, old: bool) -> None:
    graph, x = begun()
    kept = {"state": [keep(x.exp() * 2)]}
    values = [kept["state"][0][0] if isinstance(kept["state"][0], tuple) else kept["state"][0]]
    before = values[0].detach().clone()
    del x
    if old:
        gc.collect()
    graph.cut_off(kept, everywhere=False)
    assert values[0].grad_fn is None and not values[0].requires_grad and torch.equal(values[0], before)
    assert not graph.alive


def test_the_leaf_itself_may_be_kept() -> None:
    graph, x = begun()
    graph.cut_off([x], everywhere=False)
    assert not x.requires_grad


def test_what_is_old_and_elsewhere_is_found_by_looking_everywhere() -> None:
    graph, x = begun()
    y = x * 2
    del x
    gc.collect()
    assert graph.cut_off(None, everywhere=True)
    assert not y.requires_grad and not graph.alive
    other, x = begun()
    del x
    assert other.cut_off(None, everywhere=True)  # there was nothing to look for, which says nothing


def test_other_graphs_are_left_alone() -> None:
    weight = torch.ones(4, requires_grad=True)
    theirs = weight * 2
    graph, x = begun()
    ours = x * theirs.detach()
    graph.cut_off([theirs, ours], everywhere=True)
    assert theirs.requires_grad and not ours.requires_grad


def test_other_graphs_are_left_alone_where_a_leaf_is_gone() -> None:
    graph, x = begun()
    graph.grows_from([leaf(torch.randn(2))])  # whose leaf is gone at once
    kept, other = x.exp(), torch.randn(3, requires_grad=True).exp()
    del x
    graph.cut_off(kept, everywhere=True)
    assert kept.grad_fn is None and other.grad_fn is not None
