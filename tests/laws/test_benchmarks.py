"""The benchmarks measure what they say, and the documentation shows what was measured. No time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # where `benchmarks` is that of this repository; torchrl installs one, too

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import units  # noqa: E402
from benchmarks.cases import CASES, Aim, Case  # noqa: E402
from benchmarks.contenders import compiled_floor, floor  # noqa: E402
from benchmarks.library_models import Unavailable  # noqa: E402
from benchmarks.loop import LOOP_CASES, LoopCase, measure_loop  # noqa: E402
from benchmarks.measuring import Settings, cosine, measure, start, summary  # noqa: E402
from benchmarks.memory import _cpu_growth, measure_memory  # noqa: E402
from benchmarks.page import PAGE, page  # noqa: E402
from benchmarks.peers import PEERS, peers  # noqa: E402
from benchmarks.peers.tdhook_03 import imported_from  # noqa: E402
from benchmarks.plots import plot  # noqa: E402
from benchmarks.tables import markdown, report_tables, text  # noqa: E402
from benchmarks.timing import Contender, Times, interleaved, quartiles  # noqa: E402
from benchmarks.work import parallel_speedup, utilisation, work  # noqa: E402
from tdhook import preset  # noqa: E402


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


TINY = Case("tiny", "epsilon_plus", net, (3,), 4, aim=Aim(eager=2.0))
QUICK = Settings(seconds=0.0, compiled=False, peers=False)


def test_the_page_is_that_of_the_committed_reports() -> None:
    assert PAGE.read_text() == page(), "run `python -m benchmarks.page`"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}, {case.preset}")
def test_each_case_has_a_preset_and_its_inputs_are_the_same_each_time(case: Case) -> None:
    preset(case.preset)
    td = case.data()
    assert td["observation"].shape == (case.batch, *case.shape)
    assert (td == case.data()).all()
    assert case.on_gpu().batch == (case.gpu_batch or case.batch)


def test_the_weights_of_a_case_are_the_same_each_time() -> None:
    for one, other in zip(TINY.model().parameters(), TINY.model(frozen=True).parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad and not other.requires_grad


def test_quartiles() -> None:
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0, 7.0]


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians() -> None:
    times = {
        "floor": Times([1.0, 10.0, 2.0], [1.0, 2.0, 4.0]),
        "tdhook": Times([2.0, 20.0, 8.0], [3.0, 6.0, 9.0]),
        "zennit": Times([4.0, 60.0, 8.0], [1.0, 1.0, 1.0]),
    }
    found = summary("tdhook", times)
    assert found["wall_ms"] == 8000 and found["cpu_ms"] == 6000 and found["rounds"] == 3
    assert found["ratio"] == {"floor": [2.0, 2.0, 3.0]}
    assert found["cpu_ratio"] == {"floor": 3.0}
    assert summary("zennit", times)["ratio"]["tdhook"] == [1.5, 2.0, 2.5]
    assert summary("LXT", times) == {}


def test_contenders_take_turns_and_get_inputs_of_their_own() -> None:
    calls: list[str] = []
    td = TINY.data()

    def contender(name: str) -> Contender:
        def explain(given: TensorDict) -> torch.Tensor:
            calls.append(name)
            given["observation"].requires_grad_()
            return given["observation"]

        return Contender(explain)

    times = interleaved({name: contender(name) for name in "ab"}, td, seconds=0.0, rounds=4)
    assert {name: len(t.wall) for name, t in times.items()} == {"a": 4, "b": 4}
    assert set(calls) == {"a", "b"} and not td["observation"].requires_grad


def test_what_surrounds_a_turn_is_left_again() -> None:
    inside = False

    class Around:
        def __enter__(self) -> None:
            nonlocal inside
            inside = True

        def __exit__(self, *exception: object) -> None:
            nonlocal inside
            inside = False

    def explain(td: TensorDict) -> torch.Tensor:
        assert inside
        return td["observation"]

    interleaved({"a": Contender(explain, Around)}, TINY.data(), seconds=0.0)
    assert not inside


def test_a_case_is_measured() -> None:
    row = measure(TINY, QUICK)
    assert row["case"] == "tiny, batch 4" and row["aim"] == {"eager": 2.0}
    ours = row["contenders"]["tdhook"]
    assert len(ours["ratio"]["floor"]) == 3 and ours["rounds"] >= 5
    assert ours["cosine"] == pytest.approx(1.0) and "notes" not in ours
    both = measure(Case("tiny", "epsilon_plus", net, (3,), 4, index="all"), QUICK)["contenders"]
    assert "tdhook, one output" in both["tdhook"]["ratio"]
    assert "cosine" not in both["floor"]  # one gradient, not one for each output


def test_what_cannot_run_is_left_out_with_the_reason() -> None:
    def unavailable() -> Contender:
        raise Unavailable("it is not installed")

    def failing(td: TensorDict) -> torch.Tensor:
        raise ValueError("no such layer\nand more")

    found = start({"a": unavailable, "b": lambda: Contender(failing)}, TINY.data())
    assert found["a"].entry(found["b"]) == {"missing": "it is not installed"}
    assert found["b"].entry(found["a"]) == {"missing": "ValueError: no such layer"}
    row = measure(Case("none", "epsilon_plus", unavailable, (3,), 1), QUICK)
    assert row["missing"] == "it is not installed" and "contenders" not in row


def test_no_scale_of_a_sample_changes_how_alike_two_explanations_are() -> None:
    a = torch.randn(4, 2, 3)
    assert cosine(a * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None], a) == pytest.approx(1.0)
    assert cosine(-a, a) == pytest.approx(-1.0)


def test_peers_say_why_they_are_left_out() -> None:
    each = Case("tiny", "epsilon_plus", net, (3,), 4, index="all")
    for make in peers(each, "cpu").values():
        with pytest.raises(Unavailable, match="one output at a time"):
            make()
    assert list(peers(TINY, "cpu")) == list(PEERS)


def test_a_library_of_the_same_name_is_imported_beside_this_one(tmp_path: Path) -> None:
    (tmp_path / "tdhook").mkdir()
    (tmp_path / "tdhook" / "__init__.py").write_text("name = 'another'")
    ours, path = sys.modules["tdhook"], list(sys.path)
    with imported_from(str(tmp_path)):
        import tdhook

        assert tdhook.name == "another"
    assert sys.modules["tdhook"] is ours and sys.path == path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
def test_the_compiled_floor_is_the_floor() -> None:
    td = TINY.data()
    eager, compiled = td.copy(), td.copy()
    floor(TINY.model())(eager)
    explain = compiled_floor(TINY.model(), "cpu")
    for _ in range(2):
        explain(compiled)
    assert not torch._dynamo.config.trace_autograd_ops
    torch.testing.assert_close(compiled["attr", "observation"], eager["attr", "observation"])
    torch.testing.assert_close(compiled["action_value"], eager["action_value"])


def test_memory_is_what_was_allocated_at_most_and_in_the_end() -> None:
    kept = []

    def allocate() -> None:
        kept.append(torch.empty(1000, dtype=torch.uint8))
        torch.empty(5000, dtype=torch.uint8)

    assert _cpu_growth(allocate) == (6000, 1000)
    row = measure_memory(TINY)
    assert row["parameters"] == 4 * sum(p.numel() for p in net().parameters())
    peak = {name: found["peak"] for name, found in row["contenders"].items()}
    assert row["ratio"] == peak["tdhook"] / peak["floor"] > 0


def test_work_is_that_of_the_products() -> None:
    x = torch.rand(4, 3)
    weight = torch.rand(3, 5)
    found = work(Contender(lambda td: td["observation"] @ weight), TensorDict({"observation": x}, [4]))
    assert found["gflop"] == 2 * 4 * 3 * 5 / 1e9
    assert found["gigabytes"] == 4 * (4 * 3 + 3 * 5 + 4 * 5) / 1e9
    rates = {"copy_gigabytes_per_s": 20.0, "matmul_gflop_per_s": 100.0}
    assert utilisation({"wall_ms": 100.0, "gigabytes": 1.0, "gflop": 5.0}, rates) == (0.5, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("case", LOOP_CASES, ids=lambda case: case.name)
def test_a_loop_is_measured_with_attribution_and_without(case: LoopCase) -> None:
    pytest.importorskip("torchrl")
    row = measure_loop(case, QUICK, envs=2, steps=4, rounds=2)
    entries = row["contenders"]
    assert list(entries) == ["without", "tdhook"] and entries["without"]["ratio"] == [1.0, 1.0, 1.0]
    ours = entries["tdhook"]
    assert ours["rounds"] >= 2 and len(ours["ratio"]) == 3
    assert ours["frames_per_s"] == pytest.approx(8 / (ours["wall_ms"] / 1e3))


def test_a_loop_that_cannot_run_is_left_out_with_the_reason() -> None:
    def turns(*args: object) -> dict:
        raise ImportError("torchrl is not installed")

    row = measure_loop(LoopCase("none", turns, True, 0.6), QUICK)
    assert row["missing"] == "torchrl is not installed" and "contenders" not in row


def report() -> dict:
    entry = {"wall_ms": 2.0, "first_call_s": 0.5, "ratio": {"floor": [1.4, 1.5, 1.6]}, "cosine": 1.0}
    peer = {"wall_ms": 6.0, "ratio": {"floor": [4.0, 4.5, 5.0], "tdhook": [2.9, 3.0, 3.1]}, "cosine": 0.5}
    contenders = {"floor": {"wall_ms": 1.0}, "tdhook": entry, "zennit": peer, "LXT": {"missing": "why"}}
    row = {"case": "tiny, batch 4", "preset": "epsilon_plus", "aim": {"eager": 2.0}, "contenders": contenders}
    row["parallel_speedup"] = 1.9
    rates = {"copy_gigabytes_per_s": 20.0, "matmul_gflop_per_s": 100.0}
    machine = {"cpu": "a processor", "cores": 2, "threads": 2, "date": "2026-01-31", "torch": "2.13.0"}
    machine |= {"python": "3.11.7", "tdhook": "0.1.0", "load_average": [0.25, 0.5, 0.5], "rates": rates}
    curve = {"curve": "batch, MLP", "wall_ms": 1.0, "ratio": [1.0, 1.25, 2.0]}
    scaling = [curve | {"value": 1}, curve | {"value": 8}]
    return {"machine": machine, "table": [row], "scaling": scaling, "memory": [], "context": []}


def test_tables() -> None:
    tables = {table.title: table for table in report_tables(report())}
    costs = markdown(tables["What an explanation costs"])
    assert "| tiny, batch 4 | epsilon_plus | 1 | 1.50 (1.40–1.60) | ≤ 2 | – | – |  |" in costs
    assert "| tiny, batch 4 | epsilon_plus | 3 / – † | – | – | – | – |" in markdown(tables["Other libraries"])
    assert "to the floor  1.25  1.25" in text(tables["Scaling: batch, MLP"])
    base = {"frames_per_s": 1000.0, "wall_ms": 1.0, "ratio": [1.0, 1.0, 1.0], "cpu_ratio": 1.0}
    row = {"case": "Collector", "rate": True, "aim": 0.6}
    row["contenders"] = {"without": base, "tdhook": base | {"frames_per_s": 800.0, "ratio": [0.7, 0.8, 0.9]}}
    update = row | {"case": "Update", "rate": False, "aim": 1.3}
    (loop,) = report_tables({"machine": {}, "loop": [row, update, {"case": "x", "rate": True, "aim": 1}]})
    assert "| Collector | frames/s | 1e+03 | 800 | 0.80 (0.70–0.90) | 1.00 | – | – | – | ≥ 0.6 |" in markdown(
        loop
    )
    assert "| Update | ms | 1 | 1 | 0.80 (0.70–0.90) | 1.00 | – | – | – | ≤ 1.3 |" in markdown(loop)
    assert "| x | frames/s | – | – | – | – |" in markdown(loop)
    assert "Peak memory" not in tables and "Several outputs at once" not in tables


def test_a_line_that_was_timed_while_others_had_the_cores_is_marked() -> None:
    disturbed = report()
    disturbed["table"][0]["parallel_speedup"] = 0.2
    assert "| tiny, batch 4 § |" in markdown(report_tables(disturbed)[0])
    del disturbed["table"][0]["parallel_speedup"]  # not measured is not undisturbed
    assert "| tiny, batch 4 § |" in markdown(report_tables(disturbed)[0])
    disturbed["machine"]["threads"] = 1  # that wait for nobody
    assert "| tiny, batch 4 |" in markdown(report_tables(disturbed)[0])


def test_looking_for_free_cores_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    assert parallel_speedup(size=8, runs=1) > 0 and torch.get_num_threads() == before


def test_a_page_names_the_machine_and_the_report(tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text(json.dumps([report()]))
    made = page(tmp_path)
    assert "## a processor, 2 threads" in made and "From `here.json`." in made


def test_the_command_writes_a_report_that_can_be_shown_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "report.json", tmp_path / "report.png"
    quick = ["--seconds", "0", "--no-compile", "--no-peers", "--only", "table", "--only", "memory"]
    command.main(["MLP", "batch 1", *quick, "--json", str(file), "--plot", str(picture)])
    assert "MLP 17-256-256-6, batch 1" in capsys.readouterr().out
    (written,) = json.loads(file.read_text())
    assert [row["case"] for row in written["table"]] == ["MLP 17-256-256-6, batch 1"]
    assert "What an explanation costs" in page(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    plot({"table": [], "scaling": report()["scaling"]}, picture)


def test_units_that_relevance_names_carry_more_decisions_than_chance() -> None:
    pytest.importorskip("torchrl")
    lines: list[str] = []
    units.main(["demo", "--seeds", "1"], lines.append)
    means = {line[2:28].strip(): float(line[28:].strip("% ")) for line in lines[lines.index(lines[-1]) - 7 :]}
    assert means["deeplift, from 16 samples"] > 2 * means["chance"]
    assert means["deeplift, from 16 samples"] > means["activation"]
