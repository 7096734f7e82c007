"""A data set that Minari wrote is read by its folder, a stretch at a time, and explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("minari", reason="minari is not installed")

import gymnasium
import minari
from minari.data_collector import EpisodeBuffer

from tdhook import LRP, Target
from tdhook.datasets import Job
from tdhook.datasets.minari import Minari
from tdhook.datasets.sources import opened

LENGTHS = (5, 1, 12)
# It would know who made the data set, and for which environment.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool = False) -> tuple[Path, list[Any]]:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    draw = np.random.default_rng(0)
    box = gymnasium.spaces.Box(-10, 10, (4,), dtype=np.float64)
    space = gymnasium.spaces.Dict({"arm": box, "eye": box}) if nested else box
    episodes = []
    for i, length in enumerate(LENGTHS):
        seen = {name: draw.normal(size=(length + 1, 4)) for name in ("arm", "eye")}
        ends = np.arange(length) == length - 1
        episodes.append(
            EpisodeBuffer(
                id=i,
                observations=seen if nested else seen["arm"],
                actions=draw.integers(3, size=length),
                rewards=draw.normal(size=length),
                terminations=ends & (i != 1),
                truncations=ends & (i == 1),
            )
        )
    minari.create_dataset_from_buffers(
        "made/small-v0",
        buffer=episodes,
        observation_space=space,
        action_space=gymnasium.spaces.Discrete(3),
        data_format="hdf5",
        **dict.fromkeys(("code_permalink", "author", "algorithm_name", "description"), "of this test"),
    )
    return tmp_path / "made" / "small-v0", episodes


def test_a_stretch_is_read_in_the_names_of_torchrl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, episodes = made(tmp_path, monkeypatch)
    rows = opened(folder)
    assert isinstance(rows, Minari) and len(rows) == sum(LENGTHS)
    whole = rows.read(0, len(rows))
    seen = np.concatenate([one.observations[:-1] for one in episodes])
    after = np.concatenate([one.observations[1:] for one in episodes])
    torch.testing.assert_close(whole["observation"], torch.from_numpy(seen).float())
    torch.testing.assert_close(whole["next", "observation"], torch.from_numpy(after).float())
    assert whole["action"].tolist() == np.concatenate([one.actions for one in episodes]).tolist()
    assert whole["is_init"][:, 0].nonzero()[:, 0].tolist() == [0, 5, 6]
    assert whole["next", "done"][:, 0].nonzero()[:, 0].tolist() == [4, 5, 17]
    assert whole["next", "truncated"][:, 0].nonzero()[:, 0].tolist() == [5]
    assert whole["next", "terminated"][:, 0].nonzero()[:, 0].tolist() == [4, 17]
    assert whole["next", "reward"].shape == (18, 1) and whole["next", "reward"].dtype == torch.float32
    assert whole["episode"].tolist() == [0] * 5 + [1] + [2] * 12
    for begin in range(19):
        for end in range(begin, 19):
            assert (rows.read(begin, end) == whole[begin:end]).all(), (begin, end)
    assert Minari(folder, dtype=None).read(0, 2)["observation"].dtype == torch.float64


def test_nested_observations_stay_nested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, episodes = made(tmp_path, monkeypatch, nested=True)
    found = Minari(folder).read(4, 8)
    eye = [one.observations["eye"] for one in episodes]
    wanted = torch.from_numpy(np.concatenate([eye[0][4:5], eye[1][:1], eye[2][:2]])).float()
    torch.testing.assert_close(found["observation", "eye"], wanted)
    assert found["next", "observation", "arm"].shape == (4, 4)


def test_it_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = made(tmp_path, monkeypatch)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    policy = TensorDictModule(net, ["observation"], ["action_value"])
    method = LRP("epsilon", target=Target("action_value", "action"))
    job = Job(method, policy, Minari(folder), tmp_path / "job", chunk=7)
    job.work()
    found = job.result().rows["attr", "observation"]
    wanted = method.wrap(policy)(Minari(folder).read(0, 18))["attr", "observation"]
    torch.testing.assert_close(found, wanted)


def test_mistakes_are_told(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with pytest.raises(
        FileNotFoundError, match=r"is no data set of Minari in HDF5: it has no data/main_data.hdf5"
    ):
        Minari(tmp_path)
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "main_data.hdf5", "w") as file:
        file.attrs["total_steps"] = 0
    with pytest.raises(ValueError, match="has no episodes"):
        Minari(tmp_path)
    with h5py.File(tmp_path / "data" / "main_data.hdf5", "w") as file:
        file.create_group("episode_0")["actions"] = np.zeros(3)
    with pytest.raises(ValueError, match="an episode has no observations, rewards"):
        Minari(tmp_path)
