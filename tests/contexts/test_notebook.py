"""What a notebook shows of a plan, a ledger and an explained module."""

from __future__ import annotations

from html.parser import HTMLParser

import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.attribution import Gradient


class Table(HTMLParser):
    """The cells of a page's tables, row by row, and tags that were left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_a_plan() -> None:
    plan = LRP("epsilon_plus", target=Target("output", 0)).plan(network())
    table = Table(plan._repr_html_())
    assert not table.open and table.rows[0] == ["module", "type", "rule", "convention", "because"]
    assert [row[:3] for row in table.rows[1:]] == [list(plan.cells(row)[:3]) for row in plan]
    assert "flow: relevance" in plan._repr_html_()


def test_a_ledger() -> None:
    explained = LRP("epsilon", target=Target("output", 0), ledger=True).wrap(network())
    explained(TensorDict({"input": torch.randn(5, 3)}, [5]))
    table = Table(explained.ledger._repr_html_())
    assert table.rows[0][:3] == ["module", "operation", "rule"] and table.rows[0][-1] == "gap"
    assert [row[0] for row in table.rows[1:]] == ["0", "1", "2"]
    total = sum(float(row[3]) for row in table.rows[-1:])
    torch.testing.assert_close(
        total, float(explained.ledger.summary()[-1].of("arrived").sum()), rtol=1e-3, atol=0
    )


def test_an_explained_module() -> None:
    explained = LRP("epsilon", target=Target("output", 0), ledger=True).wrap(network())
    explained(TensorDict({"input": torch.randn(5, 3)}, [5]))
    table = Table(explained._repr_html_())
    assert ["reads", "'input'"] in table.rows and any(
        row[:1] == ["arrived"] or "arrived" in row for row in table.rows
    )
    plain = Table(Gradient(Target("output", 0)).wrap(network())._repr_html_())
    assert len(plain.rows) == 3


def test_names_are_escaped() -> None:
    class Odd(nn.Linear):
        pass

    Odd.__name__ = "<script>"
    assert "<script>" not in LRP("epsilon").plan(nn.Sequential(Odd(2, 2)))._repr_html_()
