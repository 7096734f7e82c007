"""LeRobot: the rows of a data set in its layout 2.1 or 3.0 (extra ``lerobot``: pyarrow and av), by its folder."""

from __future__ import annotations

import io
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook.extras import require
from tdhook.files import read_json

__all__ = ["LeRobot"]

_INFO = ("meta", "info.json")
_VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class _Episode:
    """Where an episode lies.

    Attributes:
        number: the episode.
        length: how many frames it has.
        table: the file of its rows.
        offset: the row of that file that is its first.
        videos: of each camera the file, and the second at which the episode begins.
    """

    number: int
    length: int
    table: Path
    offset: int
    videos: Mapping[str, tuple[Path, float]]


class LeRobot:
    """The frames of a LeRobot data set, one episode after the other, each in order of time.

    A name with dots becomes a nested key, ``"observation.state"`` is ``("observation", "state")``, and so torchrl has
    it. ``"is_init"`` and ``("next", "done")`` tell where episodes begin and end. Only the frames that are asked for are
    read, and of a video only those are decoded.

    Args:
        folder: of the data set, which has ``meta/info.json`` in it.
        cameras: the videos and pictures that are read, by their names; by default all.

    Shapes:
        ``is_init`` and ``("next", ...)`` of one value ``[frames, 1]``; a picture ``[frames, channels, height, width]``,
        bytes; what else is one number per frame ``[frames]``.

    Raises:
        FileNotFoundError: there is no such data set.
        ImportError: pyarrow is not installed, or av, and there are videos to read.
        ValueError: its layout is another.
    """

    def __init__(self, folder: str | os.PathLike[str], *, cameras: list[str] | None = None) -> None:
        self.folder = Path(folder)
        info = self.folder.joinpath(*_INFO)
        if not info.is_file():
            raise FileNotFoundError(f"{self.folder} is no data set of LeRobot: it has no {'/'.join(_INFO)}")
        told = read_json(info)
        version = told.get("codebase_version") if isinstance(told, dict) else None
        if not isinstance(told, dict) or version not in _VERSIONS:
            raise ValueError(f"{info}: the layout {version!r} is none of {', '.join(_VERSIONS)}")
        self._parquet = require("pyarrow.parquet", "reading LeRobot")
        with _told_by(info):
            self._told, self._fps = told, float(told["fps"])
            features: dict[str, dict[str, Any]] = told["features"]
            kinds = {name: str(one["dtype"]) for name, one in features.items()}
            shapes = {name: tuple(map(int, features[name]["shape"])) for name in kinds}
        pictures = [name for name, kind in kinds.items() if kind in ("video", "image")]
        unknown = set(cameras or ()) - set(pictures)
        if unknown:
            raise ValueError(
                f"there is no camera {', '.join(sorted(unknown))}; there are {', '.join(pictures) or 'none'}"
            )
        wanted = pictures if cameras is None else cameras
        self._videos = [name for name in wanted if kinds[name] == "video"]
        self._images = [name for name in wanted if kinds[name] == "image"]
        self._columns = [name for name, kind in kinds.items() if kind not in ("video", "image", "string")]
        self._shapes = {name: shapes[name] for name in self._columns}
        if self._videos:
            self._av = require("av", "reading videos of LeRobot")
        with _told_by(info.parent):
            self._episodes = self._in_files() if version == "v3.0" else self._each_a_file()
        if not self._episodes:
            raise ValueError(f"{self.folder} has no episodes")
        self._ends = list(accumulate(episode.length for episode in self._episodes))

    @staticmethod
    def is_in(folder: str | os.PathLike[str]) -> bool:
        """Whether a folder is such a data set."""
        path = Path(folder).joinpath(*_INFO)
        return path.is_file() and b"codebase_version" in path.read_bytes()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, begin: int, end: int) -> TensorDict:
        """Frames ``begin`` to ``end``, ``[end - begin, ...]``."""
        found = [self._frames(*one) for one in self._stretches(begin, end)]
        return TensorDict.cat(found) if len(found) != 1 else found[0]

    def _each_a_file(self) -> list[_Episode]:
        """Layout 2: each episode has a table and videos of its own."""
        found = []
        for line in (self.folder / "meta" / "episodes.jsonl").read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            number = int(one["episode_index"])
            place = {"episode_chunk": number // int(self._told["chunks_size"]), "episode_index": number}
            videos = {
                name: (self._inside(self._told["video_path"].format(video_key=name, **place)), 0.0)
                for name in self._videos
            }
            table = self._inside(self._told["data_path"].format(**place))
            found.append(_Episode(number, int(one["length"]), table, 0, videos))
        return found

    def _in_files(self) -> list[_Episode]:
        """Layout 3: tables and videos hold many episodes, and a table says which are where."""
        rows: list[dict[str, Any]] = []
        for path in sorted((self.folder / "meta" / "episodes").glob("*/*.parquet")):
            told = self._parquet.ParquetFile(path)
            wanted = [name for name in told.schema_arrow.names if not name.startswith(("stats/", "tasks"))]
            rows += told.read(wanted).to_pylist()
        rows.sort(key=lambda row: int(row["episode_index"]))
        found, filled = [], dict[Path, int]()
        for row in rows:
            table = self._file("data_path", row, "data")
            videos = {
                name: (
                    self._file("video_path", row, f"videos/{name}", name),
                    float(row[f"videos/{name}/from_timestamp"]),
                )
                for name in self._videos
            }
            offset, length = filled.get(table, 0), int(row["length"])
            filled[table] = offset + length
            found.append(_Episode(int(row["episode_index"]), length, table, offset, videos))
        return found

    def _file(self, what: str, row: Mapping[str, Any], of: str, key: str = "") -> Path:
        place = {name: int(row[f"{of}/{name}"]) for name in ("chunk_index", "file_index")}
        return self._inside(str(self._told[what]).format(video_key=key, **place))

    def _inside(self, path: str) -> Path:
        """A file of the data set."""
        if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir:
            raise ValueError(f"{self.folder} names the file {path!r}, which is outside of it")
        return self.folder / path

    def _stretches(self, begin: int, end: int) -> Iterator[tuple[_Episode, int, int]]:
        """Episodes, and which frames of each."""
        place = min(bisect_right(self._ends, begin), len(self._ends) - 1)
        while True:
            first = self._ends[place - 1] if place else 0
            last = max(begin, min(end, self._ends[place]))
            yield self._episodes[place], begin - first, last - first
            begin, place = last, place + 1
            if begin >= end or place == len(self._ends):
                return

    def _frames(self, episode: _Episode, begin: int, end: int) -> TensorDict:
        count = end - begin
        table = self._rows(episode.table, episode.offset + begin, count)
        number = torch.arange(begin, end)
        found = TensorDict({"is_init": (number == 0)[:, None]}, [count])
        found["next", "done"] = (number == episode.length - 1)[:, None]
        for name in self._columns:
            value = _numbers(table.column(name), (count, *self._shapes[name]))
            one = self._shapes[name] == (1,) and not name.startswith("next.")
            found[tuple(name.split("."))] = value[:, 0] if one else value
        if count and found.get("episode_index", torch.full((1,), episode.number)).ne(episode.number).any():
            raise ValueError(f"{episode.table} does not hold episode {episode.number} where it is said to be")
        for name in self._images:
            decoded = [self._picture(one) for one in table.column(name).to_pylist()]
            found[tuple(name.split("."))] = (
                torch.stack(decoded) if decoded else torch.zeros(0, dtype=torch.uint8)
            )
        for name in self._videos:
            path, first = episode.videos[name]
            found[tuple(name.split("."))] = self._decoded(path, first, begin, end)
        return found

    def _rows(self, path: Path, begin: int, count: int) -> Any:
        """Some rows of a table, of which only the groups that have them are read."""
        with self._parquet.ParquetFile(path) as file:
            ends = list(accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
            if not ends or begin + count > ends[-1]:
                raise ValueError(
                    f"{path} has {ends[-1] if ends else 0} rows, and {begin + count} are said to be there"
                )
            first, last = bisect_right(ends, begin), bisect_right(ends, max(begin, begin + count - 1))
            groups = list(range(min(first, len(ends) - 1), min(last, len(ends) - 1) + 1))
            table = file.read_row_groups(groups, columns=[*self._columns, *self._images])
        return table.slice(begin - (ends[groups[0] - 1] if groups[0] else 0), count)

    def _picture(self, stored: Mapping[str, Any]) -> Tensor:
        data = stored.get("bytes") or self._inside(str(stored["path"])).read_bytes()
        image = require("PIL.Image", "reading pictures of LeRobot")
        return torch.from_numpy(np.asarray(image.open(io.BytesIO(data)).convert("RGB")).copy()).permute(
            2, 0, 1
        )

    def _decoded(self, path: Path, first: float, begin: int, end: int) -> Tensor:
        """Frames of a video, ``[end - begin, 3, height, width]``: those nearest to their times."""
        wanted = [first + i / self._fps for i in range(begin, end)]
        found: list[Tensor] = []
        with self._av.open(str(path)) as container:
            stream = container.streams.video[0]
            if not wanted:
                return torch.zeros(0, 3, stream.height, stream.width, dtype=torch.uint8)
            container.seek(max(0, int((wanted[0] - 0.5 / self._fps) / stream.time_base)), stream=stream)
            for frame in container.decode(stream):
                if frame.time < wanted[len(found)] - 0.5 / self._fps:
                    continue
                if frame.time > wanted[len(found)] + 0.5 / self._fps:
                    break
                found.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
                if len(found) == len(wanted):
                    return torch.stack(found)
        raise ValueError(
            f"{path} has no frame at {wanted[len(found)]:.3f} s, where one of the data set is to be"
        )


@contextmanager
def _told_by(path: Path) -> Iterator[None]:
    """Have what is read there say where it is not as it is to be."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} is not as LeRobot writes it: {type(error).__name__}: {error}") from error


def _numbers(column: Any, shape: tuple[int, ...]) -> Tensor:
    """A column as numbers, ``[rows, *shape]``."""
    values = column.combine_chunks()
    while hasattr(values, "flatten") and str(values.type).startswith(
        ("list", "fixed_size_list", "large_list")
    ):
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False)
    return torch.from_numpy(array.copy()).reshape(shape)
