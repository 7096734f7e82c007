"""A data set in the layout of LeRobot is read by its folder, a stretch at a time, videos too, and explained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("av", reason="av is not installed")

import av
import pyarrow as pa
import pyarrow.parquet as pq

from tdhook import LRP, Target
from tdhook.datasets import Job
from tdhook.datasets.lerobot import LeRobot
from tdhook.datasets.sources import opened

LENGTHS, FPS, SIDE, EYE = (6, 4, 9), 10, 32, "observation.images.eye"
COUNT = sum(LENGTHS)


def state() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(COUNT, 3)).astype(np.float32)


def actions() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(COUNT, 2)).astype(np.float32)


def shade(row: int) -> int:
    """How bright the picture of a row is."""
    return 20 + 11 * row


def video(path: Path, rows: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "2", "qscale": "1"}
        for row in rows:
            picture = np.full((SIDE, SIDE, 3), shade(row), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def table(rows: range, episodes: list[int], steps: list[int]) -> pa.Table:
    return pa.table(
        {
            "observation.state": pa.array(state()[rows].tolist(), pa.list_(pa.float32())),
            "action": pa.array(actions()[rows].tolist(), pa.list_(pa.float32())),
            "next.reward": pa.array([float(row) for row in rows], pa.float32()),
            "timestamp": pa.array([step / FPS for step in steps], pa.float32()),
            "frame_index": steps,
            "episode_index": episodes,
            "index": list(rows),
            "task_index": [0] * len(rows),
        }
    )


def info(version: str, data: str, clip: str) -> dict[str, object]:
    one = {
        name: {"dtype": "int64", "shape": [1]}
        for name in ("frame_index", "episode_index", "index", "task_index")
    }
    return {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 1000,
        "total_episodes": len(LENGTHS),
        "total_frames": COUNT,
        "data_path": data,
        "video_path": clip,
        "features": {
            "observation.state": {"dtype": "float32", "shape": [3]},
            "action": {"dtype": "float32", "shape": [2]},
            "next.reward": {"dtype": "float32", "shape": [1]},
            EYE: {"dtype": "video", "shape": [SIDE, SIDE, 3]},
            "timestamp": {"dtype": "float32", "shape": [1]},
            **one,
        },
    }


def spans() -> list[range]:
    ends = np.cumsum(LENGTHS).tolist()
    return [range(end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]


def made(home: Path, version: str) -> Path:
    (home / "meta").mkdir(parents=True)
    if version == "v2.1":
        data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        clip = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        lines = []
        for i, rows in enumerate(spans()):
            path = home / data.format(episode_chunk=0, episode_index=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table(rows, [i] * len(rows), list(range(len(rows)))), path)
            video(home / clip.format(episode_chunk=0, episode_index=i, video_key=EYE), rows)
            lines.append(json.dumps({"episode_index": i, "tasks": ["do it"], "length": len(rows)}))
        (home / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    else:
        data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        clip = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        files = [[0, 1], [2]]  # the first file has two episodes
        told = []
        for file, episodes in enumerate(files):
            rows = range(spans()[episodes[0]][0], spans()[episodes[-1]][-1] + 1)
            numbers = [e for e in episodes for _ in spans()[e]]
            steps = [step for e in episodes for step in range(LENGTHS[e])]
            path = home / data.format(chunk_index=0, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table(rows, numbers, steps), path, row_group_size=4)
            video(home / clip.format(chunk_index=0, file_index=file, video_key=EYE), rows)
            for e in episodes:
                begin = (spans()[e][0] - rows[0]) / FPS
                told.append(
                    {
                        "episode_index": e,
                        "tasks": ["do it"],
                        "length": LENGTHS[e],
                        "data/chunk_index": 0,
                        "data/file_index": file,
                        f"videos/{EYE}/chunk_index": 0,
                        f"videos/{EYE}/file_index": file,
                        f"videos/{EYE}/from_timestamp": begin,
                        f"videos/{EYE}/to_timestamp": begin + LENGTHS[e] / FPS,
                        "stats/action/mean": [0.0, 0.0],
                    }
                )
        path = home / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(told), path)
    (home / "meta" / "info.json").write_text(json.dumps(info(version, data, clip)))
    return home


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_stretch_is_read_with_its_pictures(version: str, tmp_path: Path) -> None:
    rows = opened(made(tmp_path / "set", version))
    assert isinstance(rows, LeRobot) and len(rows) == COUNT
    whole = rows.read(0, COUNT)
    torch.testing.assert_close(whole["observation", "state"], torch.from_numpy(state()))
    torch.testing.assert_close(whole["action"], torch.from_numpy(actions()))
    assert whole["next", "reward"].tolist() == [[float(row)] for row in range(COUNT)]
    assert whole["index"].tolist() == list(range(COUNT))
    assert whole["episode_index"].tolist() == [0] * 6 + [1] * 4 + [2] * 9
    assert whole["is_init"][:, 0].nonzero()[:, 0].tolist() == [0, 6, 10]
    assert whole["next", "done"][:, 0].nonzero()[:, 0].tolist() == [5, 9, 18]
    pictures = whole["observation", "images", "eye"]
    assert pictures.dtype == torch.uint8 and pictures.shape == (COUNT, 3, SIDE, SIDE)
    wanted = torch.tensor([shade(row) for row in range(COUNT)]).float()
    assert (pictures.float().mean((1, 2, 3)) - wanted).abs().max() < 4
    for begin in range(COUNT + 1):
        for end in (begin, begin + 1, begin + 7):
            if end <= COUNT:
                assert (rows.read(begin, end) == whole[begin:end]).all(), (begin, end)


def test_cameras_are_chosen(tmp_path: Path) -> None:
    home = made(tmp_path / "set", "v3.0")
    assert ("observation", "images", "eye") not in set(LeRobot(home, cameras=[]).read(0, 1).keys(True, True))
    with pytest.raises(ValueError, match=r"there is no camera nose; there are observation.images.eye"):
        LeRobot(home, cameras=["nose"])


def test_it_is_explained(tmp_path: Path) -> None:
    home = made(tmp_path / "set", "v3.0")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    policy = TensorDictModule(net, [("observation", "state")], ["loc"])
    method, source = LRP("epsilon", target=Target("loc", 0)), LeRobot(home, cameras=[])
    job = Job(method, policy, source, tmp_path / "job", chunk=5)
    job.work()
    found = job.result().rows["attr", "observation", "state"]
    torch.testing.assert_close(
        found, method.wrap(policy)(source.read(0, COUNT))["attr", "observation", "state"]
    )


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no data set of LeRobot: it has no meta/info.json"):
        LeRobot(tmp_path)
    home = made(tmp_path / "set", "v2.1")
    short = home / "data" / "chunk-000" / "episode_000001.parquet"
    pq.write_table(pq.read_table(short).slice(0, 2), short)
    with pytest.raises(ValueError, match="has 2 rows, and 4 are said to be there"):
        LeRobot(home, cameras=[]).read(6, 10)
    clip = next(home.rglob("episode_000002.mp4"))
    video(clip, range(3))
    with pytest.raises(ValueError, match=r"has no frame at 0.300 s"):
        LeRobot(home).read(10, 19)
    told = json.loads((home / "meta" / "info.json").read_text())
    (home / "meta" / "info.json").write_text(json.dumps({**told, "codebase_version": "v9"}))
    with pytest.raises(ValueError, match=r"the layout 'v9' is none of v2.0, v2.1, v3.0"):
        LeRobot(home)
    changes: list[tuple[dict[str, object], str]] = [
        ({"fps": None}, "TypeError"),
        ({"features": [1]}, "AttributeError"),
        ({"features": {"action": {"dtype": "float32"}}}, "KeyError: 'shape'"),
        ({"data_path": "{nothing}"}, "KeyError: 'nothing'"),
        ({"data_path": "{episode_index.a}"}, "AttributeError"),
        ({"data_path": "data/../../{episode_index}.parquet"}, "which is outside of it"),
        ({"data_path": "/etc/passwd"}, "names the file '/etc/passwd', which is outside of it"),
    ]
    for change, text in changes:
        (home / "meta" / "info.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(ValueError, match=rf"is not as LeRobot writes it: .*{text}"):
            LeRobot(home, cameras=[])
