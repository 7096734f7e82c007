"""Rollouts on disk: whole, and read without trust."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from tdhook.rl.rollouts import load, save


def made(size: int = 3) -> TensorDict:
    return TensorDict(
        {
            "observation": torch.randn(size, 4),
            "frame": torch.randint(0, 256, (size, 8, 8, 3), dtype=torch.uint8),
            "next": {
                "done": torch.zeros(size, 1, dtype=torch.bool),
                "é/x %41": torch.randn(size, dtype=torch.bfloat16),
            },
            "empty": torch.zeros(size, 0),
        },
        [size],
    )


def same(a: TensorDict, b: TensorDict) -> bool:
    return set(a.keys(True, True)) == set(b.keys(True, True)) and bool((a == b).all())


def test_what_is_saved_is_loaded_and_not_changed_by_who_loads_it(tmp_path: Path) -> None:
    rollout = made()
    save(rollout, tmp_path / "rollout")
    assert os.listdir(tmp_path) == ["rollout"]
    loaded = load(tmp_path / "rollout")
    assert same(loaded, rollout) and loaded.batch_size == (3,)
    loaded["observation"].zero_()
    assert same(load(tmp_path / "rollout"), rollout)
    assert same(TensorDict.load_memmap(tmp_path / "rollout"), rollout)


def test_what_is_no_tensor_is_named_and_not_read(tmp_path: Path) -> None:
    rollout = made()
    rollout["note"] = NonTensorData("text", batch_size=[3])
    save(rollout, tmp_path / "rollout")
    with pytest.warns(UserWarning, match="entries of .* that are no tensors are not read: 'note'"):
        assert same(load(tmp_path / "rollout"), rollout.exclude("note"))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("meta.json", lambda data: data[:40], "meta.json is not valid JSON"),
        ("meta.json", lambda data: b"[]", "meta.json is not as that of a saved TensorDict"),
        ("meta.json", lambda data: b"{}", "holds no TensorDict"),
        ("meta.json", lambda data: data.replace(b"float32", b"nothing"), "dtype that is none"),
        ("meta.json", lambda data: data.replace(b"float32", b"load"), "dtype that is none"),
        ("meta.json", lambda data: data.replace(b"[3,4]", b"[-3,4]"), "shape that is none"),
        (
            "meta.json",
            lambda data: data.replace(b"[3,4]", b"[4294967296,4294967296]"),
            "shape that is too large",
        ),
        ("meta.json", lambda data: data.replace(b"[3,4]", b"[3,5]"), "has 48 bytes, and should have 60"),
        ("meta.json", lambda data: data.replace(b"[3,4]", b"[4,3]"), "do not fit together"),
        ("observation.memmap", lambda data: data[:-4], "has 44 bytes, and should have 48"),
        ("observation.memmap", lambda data: data + b"0", "has 49 bytes"),
        ("observation.memmap", None, "observation.memmap is missing"),
        ("next/meta.json", None, "meta.json is missing"),
    ],
)
def test_what_is_cut_off_is_told(tmp_path: Path, name: str, change: object, message: str) -> None:
    save(made(), tmp_path / "rollout")
    path = tmp_path / "rollout" / name
    text = path.read_bytes()
    if path.suffix == ".json":
        text = json.dumps(json.loads(text), separators=(",", ":")).encode()
    path.unlink()
    if callable(change):
        path.write_bytes(change(text))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "rollout")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes that are files")
def test_links_and_pipes_are_not_read(tmp_path: Path) -> None:
    save(made(), tmp_path / "rollout")
    path = tmp_path / "rollout" / "observation.memmap"
    os.rename(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"observation\.memmap is missing, or is no file"):
        load(tmp_path / "rollout")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"observation\.memmap is missing, or is no file"):
        load(tmp_path / "rollout")
    with pytest.raises(FileNotFoundError, match="holds no saved TensorDict"):
        load(tmp_path)


def test_a_full_disk_leaves_the_rollout_before(tmp_path: Path) -> None:
    before = made()
    save(before, tmp_path / "rollout")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(made(1000), tmp_path / "rollout")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["rollout"]
    assert same(load(tmp_path / "rollout"), before)
    save(made(1000), tmp_path / "rollout")
    assert load(tmp_path / "rollout").batch_size == (1000,)


def test_what_a_killed_process_left_of_a_rollout_is_replaced(tmp_path: Path) -> None:
    for cut in (None, b"", b'{"observation":{"de'):
        save(made(), tmp_path / "rollout")
        (tmp_path / "rollout" / "meta.json").unlink()
        if cut is not None:
            (tmp_path / "rollout" / "meta.json").write_bytes(cut)
        save(made(2), tmp_path / "rollout")
        assert load(tmp_path / "rollout").batch_size == (2,)


def test_what_lies_beside_a_rollout_is_not_removed(tmp_path: Path) -> None:
    save(made(), tmp_path / "rollout")
    (tmp_path / "rollout" / "next" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"choose another folder \(next/notes\.txt is in it\)"):
        save(made(), tmp_path / "rollout")
    assert (tmp_path / "rollout" / "next" / "notes.txt").read_text() == "mine"
