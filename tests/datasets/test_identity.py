"""What a job is, as plain data: the same in every process, and another where anything differs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import date
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, References, Target
from tdhook.composites import PRESETS, preset
from tdhook.datasets import Kept, Moments, TopRows
from tdhook.datasets.identity import described, difference, digest_of, module_identity
from tdhook.rules import EpsilonRule
from tdhook.selectors import Type

SCRIPT = """
import json, torch
from torch import nn
from tdhook import LRP, Contrast, References, Target
from tdhook.datasets.identity import described, module_identity
torch.manual_seed(0)
data = torch.randn(3, 4)
method = LRP("deeplift", target=Contrast(Target("y", 0), Target("y", 1)), baseline={"x": data, "z": "mean"})
named = LRP("epsilon_plus", target=Target("y", "argmax"))
within = eval("lambda x: x in {'a', 'b', 'c', 'd', 'e', 'f'}")
model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
print(json.dumps([described(method), described(named), module_identity(model), described(within)]))
"""


def test_other_processes_say_the_same() -> None:
    path = str(Path(__file__).parents[2] / "src")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": path},
        )
        for seed in ("1", "2")
    ]
    outputs = {process.communicate()[0] for process in processes}
    assert len(outputs) == 1 and len(json.loads(outputs.pop())) == 4


def test_every_preset_is_plain_data() -> None:
    parameters: dict[str, dict[str, Any]] = {
        name: {"low": -1.0, "high": 1.0} if name.endswith("box") else {} for name in PRESETS
    }
    told = {name: json.dumps(described(preset(name, **parameters[name]))) for name in PRESETS}
    assert len(set(told.values())) == len(told)


def scaled(x: float, by: float = 2.0) -> float:
    return x * by


def shifted(x: float, by: float = 2.0) -> float:
    return x + by


def among(x: str) -> bool:
    return x in {"a", "b", "c", "d", "e", "f"}


def among_others(x: str) -> bool:
    return x in {"a", "b", "c", "d", "e", "g"}


def calling(factor: float) -> Any:
    """A function that rests on the variables of a file."""
    lines = f"FACTOR, CALLS = {factor}, []", "def inner(x): return x * FACTOR"
    text = "\n".join((*lines, "def outer(x): CALLS.append(1); return inner(x)"))
    variables: dict[str, Any] = {"__name__": "mine"}
    exec(text, variables)  # noqa: S102
    variables["CALLS"].append(factor)
    return variables["outer"]


class OfUsers:
    """Its code is looked into, as it is no library's."""

    attribute = 1

    @staticmethod
    def of(function: Any) -> Any:
        kind = type("Own", (OfUsers,), {"method": function, "__module__": "mine"})
        made = kind()
        made.held = 1
        return made


SAME = [
    (lambda: LRP("epsilon", target=Target("y", 0))),
    (lambda: LRP([(Type(nn.Linear), EpsilonRule())], target=Target("y", 0))),
    (lambda: References("sample", 3, data=TensorDict({"x": torch.ones(3)}, [3]))),
    (lambda: Kept(regions={"a": torch.ones(3)})),
    (lambda: [Moments(by="action"), TopRows(3, score=scaled)]),
    (lambda: partial(scaled, by=3.0)),
    (lambda: {"a": (1, 2.5, float("inf")), ("b", "c"): {1, 2}, "d": torch.float32, "e": slice(1, 2)}),
    (lambda: torch.nn.functional.relu),
    (lambda: torch.zeros_like),
    (lambda: "text".upper),
    (lambda: np.ones(3)),
    (lambda: [np.float32(1), 1j, b"a", re.compile("a"), Fraction(1, 2), date(2026, 1, 1)]),
    (lambda: among),
    (lambda: calling(2.0)),
    (lambda: OfUsers.of(lambda: 1)),
]
OTHER = [
    (lambda: LRP("epsilon", target=Target("y", 1))),
    (lambda: LRP([(Type(nn.Conv2d), EpsilonRule())], target=Target("y", 0))),
    (lambda: References("sample", 3, data=TensorDict({"x": torch.zeros(3)}, [3]))),
    (lambda: Kept(regions={"a": torch.zeros(3)})),
    (lambda: [Moments(by="action"), TopRows(3, score=shifted)]),
    (lambda: partial(scaled, by=4.0)),
    (lambda: {"a": (1, 2.5, float("nan")), ("b", "c"): {1, 2}, "d": torch.float32, "e": slice(1, 2)}),
    (lambda: torch.nn.functional.gelu),
    (lambda: torch.ones_like),
    (lambda: "text".lower),
    (lambda: np.ones(3) * 2),
    (lambda: [np.float32(1), 1j, b"a", re.compile("b"), Fraction(1, 2), date(2026, 1, 1)]),
    (lambda: among_others),
    (lambda: calling(3.0)),
    (lambda: OfUsers.of(lambda: 2)),
]


@pytest.mark.parametrize("place", range(len(SAME)))
def test_what_is_the_same_and_what_is_not(place: int) -> None:
    told, again, other = (described(make()) for make in (SAME[place], SAME[place], OTHER[place]))
    assert told == again == json.loads(json.dumps(told))
    assert difference(told, again) is None and difference(other, told) is not None


def test_functions_are_their_code_and_what_they_hold() -> None:
    def made(by: float) -> Any:
        return lambda x: x * by

    assert described(made(2.0)) == described(made(2.0)) != described(made(3.0))

    def recursive(n: int) -> int:
        return n and other(n - 1)

    def other(n: int) -> int:
        return n and recursive(n - 1)

    assert described(recursive) == described(recursive) != described(other)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="a list that holds itself"):
        described(loop)


def test_models_are_their_classes_settings_and_weights() -> None:
    def net(slope: float = 0.1, seed: int = 0, bias: bool = True) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 2, bias=bias), nn.LeakyReLU(slope))

    same = module_identity(net())
    assert same == module_identity(net())
    for other in (net(0.2), net(seed=1), net(bias=False), net().train(False), net().double()):
        assert module_identity(other) != same
    kept = [lambda x: x, {"slope": 0.1}, torch.ones(2), [np.ones(2)], [nn.Linear(2, 2, bias=False)]]
    others = [lambda x: -x, {"slope": 0.2}, torch.zeros(2), [np.zeros(2)], [nn.Linear(2, 2)]]
    for value, other_value in zip(kept, others, strict=True):
        for name in ("held", "_held"):
            found = []
            for one in (value, other_value):
                model = net()
                setattr(model, name, one)
                found.append(module_identity(model))
            assert found[0] != found[1], (name, value)
    norm = nn.BatchNorm1d(3)
    before = module_identity(norm)
    norm.running_mean += 1
    assert difference(module_identity(norm), before).startswith("weights: ")  # type: ignore[union-attr]


def test_digests_are_of_bytes() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert digest_of([x]) == digest_of([x.T.contiguous().T]) != digest_of([x.T])
    single = torch.arange(6)[::2][1:2]  # contiguous, and its stride is 2
    assert digest_of([single]) == digest_of([torch.tensor([2])])
    assert digest_of([x.bfloat16()]) != digest_of([x]) and digest_of([torch.zeros(0)]) == digest_of([])


def test_digests_of_sparse_tensors_are_of_places_and_values() -> None:
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    ones = [dense.to_sparse(), dense.to_sparse(), (2 * dense).to_sparse(), dense.flip(0).to_sparse()]
    digests = [digest_of([x]) for x in ones]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_differences_are_named() -> None:
    ours, theirs = {"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}
    assert difference(ours, theirs) == "a.b[1].c: 2 and not 3"
    assert difference({"a": 1}, {"a": 1, "b": "x" * 100}) == f"b: None and not '{'x' * 76}..."
    assert difference([1, 2], [1]) == ": [1, 2] and not [1]"
    ours, theirs = [*range(40), "ours"], [*range(40), "theirs", 1]
    assert (
        difference(ours, theirs)
        == ": ...5, 36, 37, 38, 39, 'ours'] and not ...5, 36, 37, 38, 39, 'theirs', 1]"
    )
