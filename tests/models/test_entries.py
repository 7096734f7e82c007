"""Entries of TensorDicts in all their forms, and what a copy of them holds."""

from __future__ import annotations

import torch
from tensordict import NonTensorData, TensorDict, lazy_stack

from tdhook.keys import put
from tdhook.models.entries import (
    changed,
    dense_copy,
    entries_of,
    frames_of,
    is_batch,
    is_ragged,
    leaves_of,
    objects_of,
)


def stacked(*sizes):
    return lazy_stack([TensorDict({"o": torch.ones(4), "e": torch.ones(n)}, []) for n in sizes])


def test_what_has_entries():
    assert is_batch(TensorDict()) and is_batch(stacked(1, 2))
    assert not is_batch(torch.ones(1)) and not is_batch(NonTensorData("text")) and not is_batch(None)


def test_entries_of_any_kind():
    td = TensorDict({"a": {"x": torch.ones(2)}, "text": "one", "lazy": stacked(1, 2)}, [2])
    entries = dict(entries_of(td))
    assert set(entries) == {("a", "x"), "text", ("lazy", "o"), ("lazy", "e")}
    assert [x.shape for x in entries["lazy", "e"]] == [(1,), (2,)]
    assert [key for key, _ in leaves_of("lazy", td["lazy"])] == [("lazy", "o")]


def test_changes():
    td = TensorDict({"x": torch.ones(2), "text": "one", "lazy": stacked(1, 2)}, [2])
    before = objects_of(td)
    assert changed(before, objects_of(td)) == []
    td["x"] = torch.ones(2)
    td["lazy"].tensordicts[0]["e"] = torch.ones(1)
    assert set(changed(before, objects_of(td))) == {"x", ("lazy", "e")}


def test_a_dense_copy():
    td = TensorDict({"even": stacked(2, 2), "ragged": stacked(1, 2)}, [2])
    copy = dense_copy(td)
    assert type(copy["even"]) is TensorDict and copy["even", "e"] is copy["even", "e"]
    assert is_ragged(copy, ("ragged", "e")) and not is_ragged(copy, ("ragged", "o"))
    assert set(dense_copy(stacked(1, 2)).keys()) == {"o"}


def test_frames():
    outputs = TensorDict({"a": TensorDict({"x": torch.ones(2, 3)}, [2, 3]), "b": {"y": torch.ones(2)}}, [2])
    assert [(key, frame.batch_size) for key, frame in frames_of(outputs, TensorDict())] == [("a", (2, 3))]
    assert list(frames_of(outputs, outputs)) == []


def test_putting():
    td = TensorDict({"a": TensorDict({"x": torch.ones(2, 3, 4)}, [2, 3], names=["b", "n"])}, [2], names=["b"])
    put(td, ("attr", "a", "x"), torch.zeros(2, 3, 4), ("a", "x"))
    assert td["attr"].names == ["b"] and td["attr", "a"].names == ["b", "n"]
    put(td, ("more", "a", "x"), torch.zeros(2, 5, 3, 4), ("a", "x"))
    assert td["more", "a"].batch_size == (2, 5, 3) and td["more", "a"].names == ["b", None, "n"]
    put(td, ("attr", "a", "x"), torch.zeros(2, 5, 3, 4), ("a", "x"))
    assert td["attr", "a"].batch_size == (2,)
    put(td, ("new", "y"), torch.zeros(2, 1))
    assert td["new"].batch_size == (2,)
