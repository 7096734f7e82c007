"""Minari: the rows of an offline data set in HDF5 (extra ``minari``: h5py), by its folder, without the network."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook.extras import require

__all__ = ["Minari"]

_FILE = ("data", "main_data.hdf5")


class Minari:
    """The steps of a Minari data set, one episode after the other, each in order of time.

    Entries have the names that torchrl gives them: ``"observation"`` (nested, where the space is a dictionary) and
    ``("next", "observation")``, ``"action"``, ``("next", "reward")``, ``"terminated"``, ``"truncated"`` and ``"done"``
    below ``"next"``, ``"is_init"`` and ``"episode"``. Only the steps that are asked for are read.

    Args:
        folder: of the data set, which has ``data/main_data.hdf5`` in it.
        dtype: what double precision is rounded to, as most policies read single precision; ``None`` leaves it.

    Shapes:
        ``reward``, ``done`` and the like and ``is_init`` ``[steps, 1]``, ``episode [steps]``; an action that is one
        whole number ``[steps]``.

    Raises:
        FileNotFoundError: there is no such data set.
        ImportError: h5py is not installed.
        ValueError: it has no episodes, or is not laid out as Minari does.
    """

    def __init__(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = torch.float32) -> None:
        self.folder, self.dtype = Path(folder), dtype
        self._path = self.folder.joinpath(*_FILE)
        if not self._path.is_file():
            raise FileNotFoundError(
                f"{self.folder} is no data set of Minari in HDF5: it has no {'/'.join(_FILE)}"
            )
        self._h5py = require("h5py", "reading Minari")
        with self._opened() as file:
            names = sorted((name for name in file if name.startswith("episode_")), key=lambda n: int(n[8:]))
            if not names:
                raise ValueError(f"{self._path} has no episodes")
            missing = [one for one in ("observations", "actions", "rewards") if one not in file[names[0]]]
            if missing:
                raise ValueError(
                    f"{self._path} is not as Minari writes it: an episode has no {', '.join(missing)}"
                )
            self._names = names
            self._ends = list(accumulate(len(file[name]["rewards"]) for name in names))

    @staticmethod
    def is_in(folder: str | os.PathLike[str]) -> bool:
        """Whether a folder is such a data set."""
        return Path(folder).joinpath(*_FILE).is_file()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, begin: int, end: int) -> TensorDict:
        """Steps ``begin`` to ``end``, ``[end - begin, ...]``."""
        with self._opened() as file:
            found = [self._episode(file, *one) for one in self._stretches(begin, end)]
        return TensorDict.cat(found) if len(found) != 1 else found[0]

    def _opened(self) -> Any:
        return self._h5py.File(self._path, "r")

    def _stretches(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Episodes, and which steps of each."""
        episode = min(bisect_right(self._ends, begin), len(self._ends) - 1)
        while True:
            first = self._ends[episode - 1] if episode else 0
            last = min(end, self._ends[episode])
            yield episode, begin - first, max(begin, last) - first
            begin, episode = last, episode + 1
            if begin >= end or episode == len(self._ends):
                return

    def _episode(self, file: Any, episode: int, begin: int, end: int) -> TensorDict:
        group = file[self._names[episode]]
        count = end - begin
        seen, after = (self._values(group["observations"], a, a + count) for a in (begin, begin + 1))
        if self._length(after) != count:
            raise ValueError(f"{self._path}: {self._names[episode]} has no observation after its last step")
        ended, cut = (self._column(group[name][begin:end]) for name in ("terminations", "truncations"))
        begins = torch.zeros(count, 1, dtype=torch.bool)
        if begin == 0 and count:
            begins[0] = True
        return TensorDict(
            {
                "observation": seen,
                "action": self._values(group["actions"], begin, end),
                "is_init": begins,
                "episode": torch.full((count,), int(self._names[episode][8:])),
                "next": {
                    "observation": after,
                    "reward": self._column(group["rewards"][begin:end]),
                    "terminated": ended,
                    "truncated": cut,
                    "done": ended | cut,
                },
            },
            [count],
        )

    def _values(self, stored: Any, begin: int, end: int) -> Tensor | TensorDict:
        if isinstance(stored, self._h5py.Group):
            return TensorDict(
                {name: self._values(stored[name], begin, end) for name in stored}, [end - begin]
            )
        return self._tensor(stored[begin:end])

    def _tensor(self, array: Any) -> Tensor:
        found = torch.from_numpy(array)
        return found.to(self.dtype) if found.dtype is torch.float64 and self.dtype is not None else found

    def _column(self, array: Any) -> Tensor:
        return self._tensor(array)[:, None]

    def _length(self, value: Tensor | TensorDict) -> int:
        if isinstance(value, Tensor):
            return len(value)
        return min((len(one) for one in value.values(True, True)), default=0)
