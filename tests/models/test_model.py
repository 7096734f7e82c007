"""A plain module is given keys, whatever it returns."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, set_skip_existing
from torch import nn

from tdhook.models.model import Model

RETURNS = {
    "a tensor": (["a"], lambda x: x + 1),
    "a tuple": (["a", ("b", "c")], lambda x: (x + 1, x * 2)),
    "a dictionary": (["a", ("b", "c")], lambda x: {"a": x + 1, ("b", "c"): x * 2, "d": x}),
    "a TensorDict": (["a", ("b", "c")], lambda x: TensorDict({"a": x + 1, "b": {"c": x * 2}}, [len(x)])),
    "more than is wanted": (["a", "_"], lambda x: (x + 1, None)),
}


class Returning(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize("out_keys, function", RETURNS.values(), ids=RETURNS)
def test_what_a_plain_module_returns_is_written_as_tensordict_writes_it(out_keys, function):
    module, x = Returning(function), torch.rand(3, 2)
    found, expected = TensorDict({"input": x}, [3]), TensorDict({"input": x}, [3])
    Model.of(module, out_keys=out_keys).runner(found)
    TensorDictModule(module, ["input"], out_keys)(expected)
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    assert (found == expected).all()


def test_entries_that_are_there_are_skipped_where_they_are_to_be():
    runner = Model.of(Returning(lambda x: x + 1), out_keys=["a"]).runner
    td = TensorDict({"input": torch.ones(1), "a": torch.zeros(1)}, [1])
    with set_skip_existing(True):
        assert runner(td)["a"].item() == 0
    assert runner(td)["a"].item() == 2


def test_what_is_missing_is_named():
    runner = Model.of(Returning(lambda x: x + 1), out_keys=["a"]).runner
    with pytest.raises(KeyError, match="input"):
        runner(TensorDict({"other": torch.ones(1)}, [1]))
    with pytest.raises(RuntimeError, match="more tensors"):
        Model.of(Returning(lambda x: (x, x)), out_keys=["a"]).runner(
            TensorDict({"input": torch.ones(1)}, [1])
        )
