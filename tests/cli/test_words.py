"""The words of a job are noted, and typed again to go on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tdhook.cli.words import Words


def test_only_what_was_said_is_said_again() -> None:
    words = Words("policy.pt", "a buffer")
    assert words.command(Path("job")) == (
        "tdhook dataset explain --out job --policy policy.pt --source 'a buffer'"
    )
    said = Words("policy.pt", "buffer", keep="none", key=("a", "b.c"), in_order=True, chunk=8, seed=1)
    assert said.command(Path("job")).endswith(
        "--source buffer --keep none --key a --key b.c --in-order --chunk 8 --seed 1"
    )


def test_what_was_noted_is_read() -> None:
    said = Words("policy.pt", "buffer", target="value", key=("a",), chunk=8)
    told = json.loads(json.dumps({**asdict(said), "environment": "CartPole-v1"}))
    assert Words.told(told) == said
    del told["keep"], told["seed"]
    with pytest.raises(ValueError, match=r"words\.json does not say keep, seed: it is of another version"):
        Words.told(told)
