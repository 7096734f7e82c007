"""Files are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tdhook.files import completed, read_json, replacing, require_text, together, write_whole


def stopped(path: Path) -> None:
    with replacing(path) as new:
        new.write_text("half")
        raise OSError(28, "No space left on device")


def test_a_file_is_replaced_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_whole(path, b"first")
    path.chmod(0o640)
    with pytest.raises(OSError, match="No space left"):
        stopped(path)
    assert path.read_bytes() == b"first" and os.listdir(path.parent) == ["a.txt"]
    write_whole(path, b"second")
    assert path.read_bytes() == b"second" and stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(IsADirectoryError, match="is a folder, where a file is to be written"):
        write_whole(tmp_path, b"")


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    write_whole(Path(os.devnull), b"gone")
    assert not Path(os.devnull).is_file()
    (tmp_path / "link").symlink_to(os.devnull)
    write_whole(tmp_path / "link", b"gone")
    assert (tmp_path / "link").is_symlink()


def test_entries_come_together_and_rooms_of_the_dead_go(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / ".tdhook-dead").mkdir(parents=True)
    (folder / "old.png").write_text("old")
    with together(folder, lambda: ["old.png", "../x", "never.png"]) as new:
        (new / "a.png").write_text("a")
        assert sorted(path.name for path in folder.glob("*.png")) == ["old.png"]
    assert os.listdir(folder) == ["a.png"]


@pytest.mark.parametrize("journal", [b"", b"[" * 100_000, b"3", b'{"move": 3, "remove": {}}', None])
def test_a_journal_that_is_none_moves_nothing_and_goes(tmp_path: Path, journal: bytes | None) -> None:
    left = tmp_path / ".tdhook-complete"
    left.mkdir()
    (left / "a.png").write_text("sent")
    if journal is not None:
        (left / ".tdhook-journal").write_bytes(journal)
    completed(tmp_path)
    assert os.listdir(tmp_path) == []


def fail(folder: Path) -> None:
    with together(folder) as new:
        (new / "a").write_text("a")
        raise ValueError("no")


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"):
        fail(tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": NaN}', "[Infinity]", "\ud800"])
def test_what_is_no_json_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"a\.json is (nested too deeply|not valid JSON)"):
        read_json(tmp_path / "a.json")


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(ValueError, match=f"{name} is no file"):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_path_that_is_no_text_is_told(tmp_path: Path) -> None:
    require_text(tmp_path / "ü $x 日本")
    with pytest.raises(ValueError, match="is no text in UTF-8, and torch maps no files there: rename it"):
        require_text(tmp_path / "\udcff" / "rollout")


def test_a_link_to_nowhere_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="link is a file, where a folder is to be written"):
        write_whole(tmp_path / "link" / "a.txt", b"")
