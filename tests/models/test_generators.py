"""What random generators hold is told from what they held, and put back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tdhook.models.generators import drawn_by_others, drawn_by_torch, of_generator

SHARED = {
    "python": (drawn_by_others, random.random),
    "numpy": (drawn_by_others, np.random.random),
    "torch": (drawn_by_torch, lambda: torch.rand(())),
}
OWN = {
    "python": (random.Random(0), lambda g: g.random()),
    "torch": (torch.Generator().manual_seed(0), lambda g: torch.rand((), generator=g)),
    "older numpy": (np.random.RandomState(0), lambda g: g.random()),
    "bits": (np.random.PCG64(0), lambda g: g.random_raw()),
    **{
        kind.__name__: (np.random.Generator(kind(0)), lambda g: g.random())
        for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)
    },
}


@pytest.mark.parametrize("kind", OWN)
def test_a_generator(kind: str) -> None:
    generator, draw = OWN[kind]
    held = of_generator(generator)
    assert held is not None and not held.changed()
    first = [draw(generator) for _ in range(3)]
    assert held.changed()
    held.restore()
    assert not held.changed()
    assert [draw(generator) for _ in range(3)] == first


@pytest.mark.parametrize("kind", SHARED)
def test_what_all_share(kind: str) -> None:
    shared, draw = SHARED[kind]
    held = list(shared())
    assert not any(each.changed() for each in held)
    first = [draw() for _ in range(3)]
    assert any(each.changed() for each in held)
    for each in held:
        each.restore()
    assert [draw() for _ in range(3)] == first
