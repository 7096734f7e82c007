"""`tdhook dataset` explains a buffer, says how far it is, goes on, verifies and reduces."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("typer")
pytest.importorskip("torchrl")

from typer.testing import CliRunner, Result

from tdhook.cli import jobs
from tdhook.cli.commands import app
from tdhook.cli.reducing import reduced_tables
from tdhook.datasets import Histogram, Job, Moments, gather, open_result
from tdhook.datasets.reducing import Piece
from tdhook.rl import save_policy
from tdhook.rl.policies import Policy, build_actor

COUNT = 60


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.manual_seed(0)
    architecture = {"in_features": 4, "out_features": 2, "num_cells": [8], "activation": "ReLU"}
    features, actions = ("w", "x", "y", "z"), ("go west", "go east")
    actor = build_actor("dqn_mlp", architecture)
    metadata = {"kind": "dqn_mlp", "architecture": architecture}
    save_policy(Policy(actor, "CartPole-v1", features, actions, metadata), "policy.pt")
    buffer(COUNT).memmap("buffer")


def buffer(count: int) -> TensorDict:
    action = torch.nn.functional.one_hot(torch.arange(count) % 2, 2).bool()
    observation = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return TensorDict({"observation": observation, "action": action}, [count])


def tdhook(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["dataset", *arguments], prog_name="tdhook")


def explain(*more: str) -> Result:
    return tdhook(
        "explain", "--policy", "policy.pt", "--source", "buffer", "--out", "job", "--workers", "1", *more
    )


def succeeds(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def fails(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_from_a_buffer_to_numbers() -> None:
    assert "job: all 60 rows are explained" in succeeds(explain("--chunk", "16"))
    assert "job: all 60 rows are explained" in succeeds(tdhook("status", "job"))
    assert "4 chunks were read: as written\n" in succeeds(tdhook("verify", "job"))
    assert "2 were explained again: the same\n" in succeeds(tdhook("verify", "job", "--sample", "2"))
    shown = succeeds(tdhook("reduce", "job"))
    for text in ("go west (30)", "go east (30)", "go west: w", "top: 12 rows", "sample: 60 rows"):
        assert text in shown, text
    result = open_result("job")
    assert result.rows["attr", "observation"].shape == (COUNT, 4)
    even = result.rows["attr", "observation"][::2].double()
    torch.testing.assert_close(result.reduced["moments"]["mean"][0], even.mean(0))


def test_what_a_folder_says_is_not_imported() -> None:
    succeeds(explain("--chunk", "16"))
    Path("evil.py").write_text(
        "from pathlib import Path\nfrom tdhook.rl import load_policy\nPath('code-ran').touch()\n"
        "def make(): return load_policy('policy.pt')\ndef same(rows): return rows\n"
    )
    told = json.loads(Path("job/words.json").read_text())
    for name, named in (("policy", "evil:make"), ("prepare", "evil:same")):
        Path("job/words.json").write_text(json.dumps({**told, name: named}))
        for command in (("status",), ("verify",), ("reduce",), ("report",)):
            succeeds(tdhook(*command, "job"))
        said = fails(tdhook("verify", "job", "--sample", "1"))
        assert f"job says that its {name} is {named}, which would be imported" in said
        assert f"say so, --{name} {named}" in said and not Path("code-ran").exists()
    Path("job/words.json").write_text(json.dumps({**told, "policy": "evil:make"}))
    assert "1 were explained again: the same" in succeeds(
        tdhook("verify", "job", "--sample", "1", "--policy", "evil:make")
    )
    assert Path("code-ran").exists()
    del sys.modules["evil"]
    for name, odd in (("policy", 3), ("chunk", "many"), ("key", "x"), ("in_order", None)):
        Path("job/words.json").write_text(json.dumps({**told, name: odd}))
        assert f"words.json says {name} is" in fails(tdhook("verify", "job", "--sample", "1"))


def test_kept_rows_are_reduced_again() -> None:
    succeeds(explain("--reduce", "none", "--rows", "10:50"))
    assert "has reduced rows to nothing" in fails(tdhook("reduce", "job"))
    succeeds(tdhook("reduce", "job", "--reduce", "moments,top:3", "--out", "numbers"))
    rows = open_result("job").rows["attr", "observation"]
    found = TensorDict.load_memmap("numbers/moments")
    assert found["count"].tolist() == [20, 20]
    torch.testing.assert_close(found["mean"][1], rows[1::2].double().mean(0))
    best = TensorDict.load_memmap("numbers/top")
    assert best["row"][:3].tolist() == (rows[::2].sum(-1).topk(3).indices * 2).tolist()
    other = buffer(COUNT)
    other["observation"] += 1
    other.memmap("other")
    text = fails(tdhook("reduce", "job", "--reduce", "moments", "--source", "other"))
    assert "the source is not that of job, and differs in" in text


def test_what_is_stopped_goes_on_by_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(job: Job, workers: object, show: Callable[[object], object]) -> None:
        job.work(until=iter([False, False, True]).__next__)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_at_work", stopped)
        result = explain("--chunk", "16", "--keep", "bfloat16")
    assert result.exit_code == 130
    assert "stopped: 32 of 60 rows are done, and stay so." in result.output
    line = next(line for line in result.output.splitlines() if "tdhook dataset explain" in line)
    assert "32 of 60 rows are explained (53.3%)" in succeeds(tdhook("status", "job"))
    assert "32 of 60 rows are explained (53.3%): go on, tdhook" in fails(tdhook("reduce", "job"))
    succeeds(tdhook(*line.split()[2:]))
    succeeds(
        tdhook(
            "explain", *("--out", "whole", "--policy", "policy.pt", "--source", "buffer", "--workers", "1")
        )
    )
    found, whole = (open_result(name).rows["attr", "observation"] for name in ("job", "whole"))
    assert torch.equal(found, whole.bfloat16())


def test_several_processes_write_the_same() -> None:
    succeeds(explain("--chunk", "16"))
    given = ("--policy", "policy.pt", "--source", "buffer", "--out", "many", "--chunk", "16")
    succeeds(tdhook("explain", *given, "--workers", "2"))
    for path in (path for path in Path("job").rglob("*") if path.is_file()):
        if path.parts[1] not in ("claims", "workers"):
            assert path.read_bytes() == Path("many", *path.parts[1:]).read_bytes(), path


def test_what_is_changed_on_the_disk_is_found() -> None:
    succeeds(explain("--chunk", "16"))
    path = next(Path("job/rows").rglob("*observation.memmap"))
    data = bytearray(path.read_bytes())
    data[4 * 4 * 20] ^= 1
    path.write_bytes(data)
    result = tdhook("verify", "job")
    assert result.exit_code == 1
    assert "4 chunks were read: 1 not as they were written (chunks 1)" in result.output


def test_other_words_are_refused() -> None:
    succeeds(explain())
    assert "is the folder of another job, which differs in method" in fails(explain("--composite", "epsilon"))
    assert json.loads(Path("job/words.json").read_text())["composite"] == "epsilon_plus"


def test_bytes_are_prepared_and_a_baseline_is_taken(tmp_path: Path) -> None:
    halved = "def halved(rows):\n    return rows.copy().set('observation', rows['seen'] / 2)\n"
    (tmp_path / "my_rows.py").write_text(halved)
    rows = buffer(20)
    rows.rename_key_("observation", "seen").memmap("seen")
    given = ("--policy", "policy.pt", "--source", "seen", "--out", "prepared", "--prepare", "my_rows:halved")
    succeeds(tdhook("explain", *given, "--baseline", "mean", "--composite", "deeplift", "--keep", "none"))
    assert open_result("prepared").reduced["moments"]["mean"].shape == (2, 4)
    text = fails(tdhook("reduce", "prepared", "--reduce", "moments"))
    assert "prepared has kept no relevance of rows" in text


@pytest.mark.parametrize(
    "more, text",
    [
        (["--keep", "float16"], "--keep float16 is none of all, bfloat16, compressed, none"),
        (["--reduce", "median"], "--reduce has 'median' in it"),
        (["--reduce", "top:0"], "--reduce has 'top:0' in it"),
        (["--rows", "all"], "--rows 'all' is no stretch of rows"),
        (["--source", "nowhere"], "there is no folder"),
        (["--prepare", "nothing"], "'nothing' is not written as package.module:function"),
        (["--key", "colour"], "'colour' is named, and there is relevance of 'observation'"),
        (["--by", "colour"], "rows are told apart by 'colour', and the source has"),
    ],
)
def test_mistakes_end_in_one_line(more: list[str], text: str) -> None:
    assert text in fails(explain(*more))


def test_a_report_has_names_frames_and_words() -> None:
    succeeds(explain("--chunk", "16"))
    text = succeeds(tdhook("report", "job"))
    assert "wrote job/report.html (" in text
    assert ("no strategies are shown" in text) == (find_spec("sklearn") is None)
    page = Path("job/report.html").read_text(encoding="utf-8")
    title = "CartPole-v1: relevance for action_value:action under epsilon_plus"
    for words in (f"<h1>{title}</h1>", "go west", "go east", "policy.pt", "60 rows explained"):
        assert words in page, words
    best = open_result("job").reduced["top"]["row"][0]
    assert f"at {buffer(COUNT)['observation'][best, 0].item():.4g}".replace("-", "−") in page
    assert ("sample" in page) == (find_spec("sklearn") is not None)
    assert "wrote mine.html (" in succeeds(tdhook("report", "job", "--out", "mine.html", "--title", "Mine"))
    assert "<h1>Mine</h1>" in Path("mine.html").read_text(encoding="utf-8")


def test_a_report_goes_without_the_source_or_with_another_place_of_it() -> None:
    succeeds(explain("--baseline", "0", "--composite", "deeplift"))
    shutil.move("buffer", "moved")
    text = succeeds(tdhook("report", "job"))
    assert "note: the rows of the source are not where they were" in text and "give --source" in text
    page = Path("job/report.html").read_text(encoding="utf-8")
    assert "under deeplift against 0" in page and "go west" in page
    assert "rows of the source" not in succeeds(tdhook("report", "job", "--source", "moved"))
    assert Path("job/report.html").read_text(encoding="utf-8") != page
    other = buffer(COUNT)
    other["observation"] += 1
    other.memmap("other")
    text = fails(tdhook("report", "job", "--source", "other"))
    assert "the source is not that of job, and differs in" in text


def test_a_gathered_folder_knows_what_was_typed() -> None:
    succeeds(explain("--chunk", "16"))
    gather(["job"], "gathered")
    assert Path("gathered/words.json").read_bytes() == Path("job/words.json").read_bytes()
    pages = []
    for name in ("job", "gathered"):
        succeeds(tdhook("report", name))
        pages.append(Path(name, "report.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1] and "go west" in pages[0]
    assert "1 were explained again: the same" in succeeds(tdhook("verify", "gathered", "--sample", "1"))


def test_no_report_is_made_of_what_is_not_done_or_not_reduced() -> None:
    succeeds(explain("--reduce", "none"))
    assert "rows were reduced to nothing" in fails(tdhook("report", "job"))
    next(Path("job/done").iterdir()).unlink()
    assert "0 of 60 rows are explained (0.0%): go on, tdhook dataset explain" in fails(
        tdhook("report", "job")
    )
    assert not Path("job/report.html").exists()


def test_a_folder_of_something_else_is_told() -> None:
    for command in ("status", "verify", "reduce", "report"):
        assert "buffer is no job folder of tdhook" in fails(tdhook(command, "buffer"))


def test_another_method() -> None:
    succeeds(explain("--method", "integrated_gradients:steps=5", "--baseline", "mean"))
    found = open_result(Path("job")).rows["attr", "observation"]
    assert found.shape == (COUNT, 4) and found.any()
    assert "under integrated_gradients:steps=5" in (
        succeeds(tdhook("report", "job")) and Path("job/report.html").read_text()
    )
    line = explain("--method", "gradient", "--baseline", "mean").stderr
    assert "Gradient compares with no baseline: leave out the baseline" in line
    for composite in ("epsilon", "epsilon_plus"):
        line = explain("--method", "gradient", "--composite", composite).stderr
        assert "--composite is one of LRP, and --method another way to explain" in line


def test_of_several_relevances_the_named_one_is_reduced() -> None:
    layer = "module.0.module.0"
    method = ("--method", f"conductance:input_modules=[{layer}],steps=3", "--reduce", "moments")
    succeeds(explain(*method, "--key", "observation"))
    rows = open_result("job").rows["attr", "observation"]
    succeeds(
        tdhook("reduce", "job", "--reduce", "moments", "--by", "none", "--key", "observation", "--out", "n")
    )
    found = TensorDict.load_memmap("n/moments")["mean"][0]
    torch.testing.assert_close(found, rows[:].double().mean(0))
    assert "'colour' is named" in fails(tdhook("reduce", "job", "--reduce", "moments", "--key", "colour"))


@pytest.mark.parametrize("count", [12, 13])
def test_tables_say_of_how_many_features_they_are(count: int) -> None:
    reducers = {"moments": Moments(), "histogram": Histogram()}
    relevance = torch.randn(50, count)
    piece = Piece(TensorDict(batch_size=[50]), torch.arange(50), {"x": relevance}, {"x": relevance})
    reduced = {}
    for name, reducer in reducers.items():
        reduced[name] = TensorDict(reducer.result(reducer.part(piece)), batch_size=[])
    titles = [str(table.title) for table in reduced_tables(reduced, reducers, (), ())]
    more = [", the largest 12 of 13 features", ", the first 12 of 13 features"] if count > 12 else ["", ""]
    assert titles == [f"moments: mean relevance{more[0]}", f"histogram: quantiles of relevance{more[1]}"]
