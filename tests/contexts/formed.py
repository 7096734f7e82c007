"""Batches and policies of forms of their own, and what shows that they are explained as any."""

from __future__ import annotations

import torch
from tensordict import (
    NonTensorData,
    TensorDict,
    is_tensor_collection,
)
from tensordict.nn import TensorDictModule

from tdhook import LRP

OBSERVATION = torch.arange(20.0).reshape(5, 4).sin()


def q_of(layer, **options):
    return TensorDictModule(layer, ["observation"], ["q"], **options)


def batch(**entries):
    return TensorDict({"observation": OBSERVATION.clone(), **entries}, [5])


def explain(model, td, target="q", **options):
    return LRP("epsilon", target=target, ledger=True).wrap(model)(td, **options)


def shown(td, *, ours=("attr", "ledger")):
    """The entries of a TensorDict, without those of an explanation, in a form that can be compared."""
    found = {(): (type(td), td.batch_size, tuple(td.names))}
    for key in td.keys():  # noqa: SIM118
        value = td.get(key)
        if key in ours:
            continue
        if is_tensor_collection(value) and not isinstance(value, NonTensorData):
            found |= {(key, *name): entry for name, entry in shown(value).items()}
        else:
            found[key,] = value.tolist()
    return found


def same_without(model, make, target="q", **options):
    """Explain one batch, run the model on another like it, and compare what they left behind."""
    plain, given = make(), make()
    returned = explain(model, given, target, **options)
    expected = model(plain, **{name: value.clone() for name, value in options.items()})
    assert shown(returned) == shown(expected)
    assert (returned is given) == (expected is plain)
    assert shown(given) == shown(plain)
    assert returned["ledger", "gap"].abs().max() < 1e-5
    return returned


def agents(names=None):
    inner = TensorDict({"observation": torch.ones(5, 3, 4).cumsum(0)}, [5, 3], names=names and ["b", "agent"])
    return TensorDict({"agents": inner}, [5], names=names and ["b"])
