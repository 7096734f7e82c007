"""Which secant belongs to what."""

from __future__ import annotations

import pytest

from tdhook.relevance.secants.averages import average, product
from tdhook.relevance.secants.norms import normalised
from tdhook.relevance.secants.shares import log_softmax, softmax
from tdhook.relevance.secants.slopes import slopes
from tdhook.relevance.secants.table import secant_of
from tdhook.relevance.secants.winners import winner


@pytest.mark.parametrize(
    "name, secant",
    [
        ("tanh", slopes),
        ("atan2", slopes),
        ("copysign", slopes),
        ("softmax", softmax),
        ("amax", winner),
        ("layer_norm", normalised),
        ("conv2d", product),
    ],
)
def test_operations(name: str, secant: object) -> None:
    assert secant_of(name) is secant


@pytest.mark.parametrize(
    "name, secant",
    [
        ("Tanh", slopes),
        ("LogSoftmax", log_softmax),
        ("MaxPool2d", winner),
        ("LayerNorm", normalised),
        ("GroupNorm", normalised),
        ("T5LayerNorm", average),
        ("InstanceNorm2d", normalised),
        ("OneOfTheirs", average),
    ],
)
def test_modules_by_the_name_of_their_class(name: str, secant: object) -> None:
    assert secant_of(name, is_module=True) is secant


def test_what_is_unknown_is_averaged() -> None:
    assert secant_of("unheard_of") is average
