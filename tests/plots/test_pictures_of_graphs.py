"""Pictures of attribution graphs."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.concepts import attribution_graph
from tdhook.plots import relevance_graph


@pytest.fixture
def graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    td = TensorDict({"input": torch.randn(3, 4)}, [3])
    method = LRP("epsilon", target=Target("output", 0))
    return attribution_graph(method, model, td, {"1": None, "3": None}, inputs={"input": None})


def test_units_are_circles_and_what_they_hand_on_lines(graph):
    one = graph[0].pruned(0.9)
    figure = relevance_graph(one, "why left", {"input": ["place", "speed", "angle", "turn"]})
    (axes,) = figure.axes
    assert len(axes.collections[0].get_offsets()) == len(one.nodes())
    assert len(axes.lines) == len(one.links())
    thickest = max(axes.lines, key=lambda line: line.get_linewidth())
    (above, below), amount = max(one.links().items(), key=lambda link: abs(link[1]))
    assert list(thickest.get_xdata()) == [one.layers.index(below.layer), one.layers.index(above.layer)]
    assert thickest.get_color() == ("#b2182b" if amount > 0 else "#2166ac")
    shown = {text.get_text() for text in axes.texts}
    assert {"input", "1", "3"} <= shown
    assert shown & {"place", "speed", "angle", "turn"}


def test_names_fit(graph):
    with pytest.raises(ValueError, match="2 names are given for 'input', which has 4 units"):
        relevance_graph(graph[0], names={"input": ["a", "b"]})
    with pytest.raises(ValueError, match="which is none of input, 1, 3"):
        relevance_graph(graph[0], names={"obs": ["a"]})
    with pytest.raises(ValueError, match="choose an element"):
        relevance_graph(graph)
