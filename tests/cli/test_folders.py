"""Output folders: written whole, read without trust."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict

pytest.importorskip("typer")
pytest.importorskip("torchrl")

from tdhook.cli.folders import made_of, picture_names, read_output, replaced_output
from tdhook.rl.rollouts import save

KILLABLE = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
"""What the system is asked for while files are written: a process may be killed before any of it."""


def told(number: int) -> dict[str, Any]:
    """What a summary says, told from others by its seed."""
    explanation = {"of": "observation", "mean_relevance": {"x": 0.0, "y": 0.0}, "action_counts": {}}
    return {
        "tdhook": "0.1.0",
        "environment": "Here-v0",
        "seed": number,
        "target": "value",
        "composite": {"name": "epsilon", "pairs": []},
        "conservation": None,
        "explanations": [explanation],
    }


def write(
    out: Path,
    number: int,
    pictures: tuple[str, ...] = ("relevance.png",),
    stop: BaseException | None = None,
) -> None:
    """What a run writes: number, everywhere."""
    values = torch.full((3, 2), float(number))
    rollout = TensorDict({"observation": values, "attr": {"observation": -values}}, batch_size=[3])
    with replaced_output(out, {"target": "value", "seed": number}) as new:
        save(rollout, new / "rollout")
        if stop is not None:
            raise stop
        for name in pictures:
            (new / name).write_text(str(number))
        (new / "summary.json").write_text(json.dumps(told(number)))


def read(out: Path) -> int:
    """The number that all is of."""
    output = read_output(out)
    (number,) = output.rollout["observation"].unique().tolist()
    assert output.told.seed == number
    assert output.rollout["attr", "observation"].unique().tolist() == [-number]
    for picture in out.glob("*.png"):
        assert picture.read_text() == str(int(number))
    return int(number)


def read_or_told(out: Path) -> int | str:
    """That, or why it cannot be read."""
    try:
        return read(out)
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def make(out: Path, name: str) -> None:
    with made_of(read_output(out), out / name) as new:
        new.write_text("made")


def killed(work: Any, point: int) -> bool:
    """Whether a process that does the work was killed before the so-many-th time that it asks for a file."""
    child = os.fork()
    if child == 0:
        left = point

        def ask(event: str, _: object) -> None:
            nonlocal left
            if event in KILLABLE:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(ask)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("first", [False, True])
def test_a_run_that_is_killed_at_any_point_leaves_one_result_or_says_so(tmp_path: Path, first: bool) -> None:
    seen = set()
    for point in range(1, 1000):
        out = tmp_path / str(point) / "out"
        if not first:
            write(out, 1, ("relevance.png", "relevance-go.png"))
            make(out, "report.html")
        if not killed(lambda out=out: write(out, 2), point):
            break
        if (out / "summary.json").exists():  # for whoever reads without tdhook
            number = json.loads((out / "summary.json").read_text())["seed"]
            assert TensorDict.load_memmap(out / "rollout")["observation"].unique().tolist() == [number]
        found = read_or_told(out)
        seen.add(found if isinstance(found, int) else 0)
        if isinstance(found, int):
            assert (out / "report.html").exists() == (found == 1)
        else:
            assert "is not finished: run it again" in found or "is no output folder" in found
        write(out, 3)
        assert read(out) == 3
        assert sorted(path.name for path in out.iterdir()) == [
            *("manifest.json", "relevance.png", "rollout", "summary.json")
        ]
    assert point > 20
    assert seen == ({0, 2} if first else {0, 1, 2})


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_page_that_is_killed_is_not_there_or_goes_with_the_next_run(tmp_path: Path) -> None:
    for point in range(1, 1000):
        out = tmp_path / str(point)
        write(out, 1)
        if not killed(lambda out=out: make(out, "why.html"), point):
            break
        assert not (out / "why.html").exists() or (out / "why.html").read_text() == "made"
        assert read(out) == 1
        write(out, 2)
        assert sorted(os.listdir(out)) == ["manifest.json", "relevance.png", "rollout", "summary.json"]
    assert point > 3


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_two_processes_that_write_to_one_folder(tmp_path: Path) -> None:
    children = []
    for number in range(1, 5):
        child = os.fork()
        if child == 0:
            try:
                for _ in range(5):
                    write(tmp_path / "out", number)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert read(tmp_path / "out") in range(1, 5)
    assert not list((tmp_path / "out").glob(".tdhook-*"))


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_a_run_leaves_the_one_before(tmp_path: Path, stop: BaseException) -> None:
    write(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(type(stop)):
        write(tmp_path, 2, stop=stop)
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if isinstance(stop, OSError):  # which said so
        assert left == before
        assert read(tmp_path) == 1
    else:
        assert left.pop(tmp_path / "unfinished.json")
        assert left == before
        with pytest.raises(
            ValueError, match=r"\(target: value, seed: 2\) is not finished: .* whole, and of the run before"
        ):
            read_output(tmp_path)
    write(tmp_path, 2)
    assert read(tmp_path) == 2


def test_what_was_made_of_a_run_goes_with_it_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1, ("relevance.png", "relevance-go.png", "frames.png"))
    for name in ("report.html", "why.gif", "kept.html"):
        make(tmp_path, name)
    (tmp_path / "kept.html").write_text("written over by hand")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "holiday.png").write_text("2")
    write(tmp_path, 2)
    names = {
        "manifest.json",
        "summary.json",
        "rollout",
        "relevance.png",
        "kept.html",
        "notes.txt",
        "holiday.png",
    }
    assert set(os.listdir(tmp_path)) == names


def test_a_page_is_not_put_beside_another_run(tmp_path: Path) -> None:
    write(tmp_path, 1)
    output = read_output(tmp_path)

    def put() -> None:
        with made_of(output, tmp_path / "a.html") as new:
            new.write_text("of the first")
            write(tmp_path, 2)

    with pytest.raises(ValueError, match="another run has written"):
        put()
    assert not (tmp_path / "a.html").exists()
    for name in ("summary.json", "rollout/a.html"):
        with pytest.raises(ValueError, match="is of what the run wrote"), made_of(output, tmp_path / name):
            pass


@pytest.mark.parametrize(
    "name",
    ["summary.json", "rollout/meta.json", "rollout/observation.memmap", "rollout/attr/observation.memmap"],
)
@pytest.mark.parametrize("kept", [None, 0, 0.5, 1])
def test_what_is_cut_off_or_changed_is_found(tmp_path: Path, name: str, kept: float | None) -> None:
    write(tmp_path, 1)
    data = (tmp_path / name).read_bytes()
    if kept is None:
        (tmp_path / name).unlink()
    else:
        cut = data[: int(kept * len(data))]
        (tmp_path / name).write_bytes(cut if kept < 1 else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ValueError, match=f"{name.rpartition('/')[2]}"):
        read_output(tmp_path)
    write(tmp_path, 2)
    assert read(tmp_path) == 2


def test_a_picture_that_is_cut_off_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "relevance.png").write_text("")
    with pytest.warns(UserWarning, match=r"relevance\.png is not as its run wrote it: it has 0 bytes of 1"):
        read_output(tmp_path)


def test_a_rollout_of_another_run_is_found_though_of_the_same_size(tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2)
    os.rename(tmp_path / "a" / "rollout", tmp_path / "c")
    os.rename(tmp_path / "b" / "rollout", tmp_path / "a" / "rollout")
    with pytest.raises(ValueError, match="SHA-256"):
        read_output(tmp_path / "a")


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{}",
        '{"files": 3, "made": {}}',
        '{"files": {"a": 3}, "made": {}}',
        "[" * 100_000,
        '{"files":',
    ],
)
def test_a_manifest_that_is_none_is_told_and_replaced(tmp_path: Path, manifest: str) -> None:
    write(tmp_path, 1)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        read_output(tmp_path)


def test_a_manifest_removes_nothing_outside_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, 1)
    for victim in (tmp_path / "a.png", out / "notes.txt", tmp_path / "relevance.png"):
        victim.write_text("mine")
    (out / "manifest.json").write_text(
        json.dumps(
            {
                "tdhook": "0.1.0",
                "files": {
                    "../a.png": {},
                    "notes.txt": {},
                    "../relevance.png": {},
                    str(tmp_path / "a.png"): {},
                },
                "made": {"../a.png": {"size": 4}, "..": {}},
            }
        )
    )
    write(out, 2)
    assert read(out) == 2
    for victim in (tmp_path / "a.png", out / "notes.txt", tmp_path / "relevance.png"):
        assert victim.read_text() == "mine"


def test_a_journal_that_somebody_sends_moves_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "thesis.txt").write_text("years")
    sent = tmp_path / ".tdhook-complete"
    (sent / "photos").mkdir(parents=True)
    (sent / "thesis.txt").write_text("none")
    journal = {"remove": ["thesis.txt", "photos", "../x", 3], "move": ["photos", "thesis.txt", "..", "a/b"]}
    (sent / ".tdhook-journal").write_text(json.dumps(journal))
    save(TensorDict({"a": torch.ones(2)}, batch_size=[2]), tmp_path / "rollout")
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"
    assert (tmp_path / "thesis.txt").read_text() == "years"


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_folder_without_manifest_is_read_with_a_note_and_without_its_pickles(tmp_path: Path) -> None:
    out, mark = tmp_path / "out", tmp_path / "code-ran"
    write(out, 1)
    (out / "manifest.json").unlink()
    rollout = TensorDict.load_memmap(out / "rollout").clone()
    rollout["note"] = NonTensorData("text", batch_size=[3])
    rollout["deep", "note"] = NonTensorData("text", batch_size=[3])
    save(rollout, out / "rollout")
    for home in (out / "rollout" / "note", out / "rollout" / "deep" / "note", out / "rollout"):
        (home / "other.pickle").write_bytes(pickle.dumps(Bomb(mark)))
    with (
        pytest.warns(UserWarning, match=r"no manifest\.json"),
        pytest.warns(UserWarning, match="'note', 'deep.note'"),
    ):
        assert read(out) == 1
    assert not mark.exists()


def test_pictures_have_names_of_their_own() -> None:
    labels = ["a", "go left", "go-left", "GO LEFT", "..", "/", "é", "\ud800", "x" * 500, "a", "2"]
    names = picture_names(labels)
    assert names[:4] == [
        "relevance.png",
        "relevance-go-left.png",
        "relevance-go-left-2.png",
        "relevance-GO-LEFT-3.png",
    ]
    assert len({name.lower() for name in names}) == len(labels)
    assert all(name.isascii() and len(name) < 120 and "/" not in name for name in names)


def test_what_is_not_of_tdhook_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"of": "something else"}')
    with pytest.raises(FileExistsError, match=r"summary\.json was not written by tdhook"):
        write(tmp_path, 1)
    assert os.listdir(tmp_path) == ["summary.json"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    out = tmp_path / "out"
    write(out, 1)
    (out / "report.html").symlink_to(outside)
    make(out, "report.html")
    (out / "relevance.png").unlink()
    (out / "relevance.png").symlink_to(outside)
    write(out, 2)
    assert outside.read_text() == "mine"
    (out / "rollout" / "observation.memmap").unlink()
    (out / "rollout" / "observation.memmap").symlink_to(outside)
    with pytest.raises(ValueError, match=r"observation\.memmap is not as its run wrote it"):
        read_output(out)
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, 3)
    os.rename(elsewhere / "rollout", tmp_path / "large")
    (elsewhere / "rollout").symlink_to(tmp_path / "large")
    assert read(elsewhere) == 3
    write(elsewhere, 4)
    assert read(elsewhere) == 4 and (tmp_path / "large" / "observation.memmap").exists()
