"""Jobs of whole data sets as they are typed: what `tdhook dataset explain`, `status` and `verify` do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text
from tensordict.utils import NestedKey, unravel_key

from tdhook.attribution.lrp import LRP
from tdhook.cli.policies import default_target, find_policy, imported, is_imported
from tdhook.cli.reducing import reduced_tables, reducers_of
from tdhook.cli.words import Words
from tdhook.configuration import (
    baseline_in,
    read_baseline,
    read_composite,
    read_method,
    read_target,
    write_target,
)
from tdhook.contexts.compared import compared
from tdhook.datasets.again import reduce_kept
from tdhook.datasets.folder import JobFolder
from tdhook.datasets.job import Job
from tdhook.datasets.launching import launch
from tdhook.datasets.result import Result, Status, Verified, open_result, status_of
from tdhook.datasets.rows import Rows, chosen
from tdhook.datasets.sources import opened
from tdhook.datasets.stored import stored_in
from tdhook.files import read_json
from tdhook.keys import parts_of
from tdhook.markup import visible
from tdhook.rl.rollouts import save

__all__ = [
    "explain",
    "finished",
    "inputs_of",
    "names_in",
    "reduce",
    "source_of",
    "status",
    "told_words",
    "verify",
]

_KEPT: dict[str, torch.dtype | str | None] = {
    "all": "all",
    "bfloat16": torch.bfloat16,
    "compressed": "compressed",
    "none": None,
}
_STOPPED = 130


def _job_of(words: Words, out: Path) -> tuple[Job, dict[str, object]]:
    """The job that words stand for, and the words with the names that a page of it shows."""
    policy = find_policy(words.policy, need_env=False)
    source = opened(words.source)
    if words.method is not None and words.composite != Words.composite:
        raise ValueError("--composite is one of LRP, and --method another way to explain: give one of them")
    method = LRP(read_composite(words.composite)) if words.method is None else read_method(words.method)
    named = baseline_in(words.composite) if words.baseline is None else words.baseline
    against = None if named in (None, "none") else read_baseline(named)
    target = default_target(policy) if words.target is None else read_target(words.target)
    if words.keep not in _KEPT:
        raise ValueError(f"--keep {words.keep} is none of {', '.join(_KEPT)}")
    prepare = words.prepare
    job = Job(
        compared(method, against).explaining(target),
        policy.actor,
        source,
        out,
        rows=None if words.rows is None else _stretch(words.rows),
        prepare=None if prepare is None else imported(prepare, "--prepare takes a function of rows"),
        in_order=words.in_order,
        chunk=words.chunk,
        keep=_KEPT[words.keep],
        reduce=reducers_of(words.reduce, words.by, words.key, source, list(policy.actor.in_keys)),
        seed=words.seed,
    )
    told: dict[str, object] = {
        **asdict(words),
        "explained": write_target(target),
        "against": named,
        "environment": policy.env_id,
        "features": list(policy.features),
        "actions": list(policy.actions),
    }
    return job, told


def _stretch(text: str) -> slice:
    try:
        parts = [int(part) if part else None for part in text.split(":")]
    except ValueError:
        parts = []
    if not 2 <= len(parts) <= 3:
        raise ValueError(f"--rows {text!r} is no stretch of rows, as 1000:2000 or ::10")
    return slice(*parts)


def told_words(folder: Path) -> dict[str, object]:
    """What was typed when a job was begun; nothing where it was begun in Python."""
    path = JobFolder(folder).words
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def explain(words: Words, out: Path, workers: int | None) -> None:
    """Work on a job until it is done, or until somebody stops it."""
    job, told = _job_of(words, out)
    if not job.folder.words.exists():
        job.folder.note(job.folder.words, json.loads(json.dumps(told)))
    console = Console(stderr=True)
    with _bar(console) as progress:
        task = progress.add_task(Text(visible(out.name)).plain, total=None, who="")

        def show(now: Status) -> None:
            who = f"{now.at_work} at work" + (f", {now.per_second:,.0f} rows/s" if now.per_second else "")
            progress.update(task, completed=now.done, total=now.rows, who=who)

        show(job.status())
        try:
            done = _at_work(job, workers, show)
        except KeyboardInterrupt:
            progress.stop()
            now = job.status()
            console.print(
                Text(
                    f"stopped: {now.done:,} of {now.rows:,} rows are done, and stay so. The same command goes on:\n"
                    f"  {words.command(out)}"
                ),
                soft_wrap=True,
            )
            raise typer.Exit(_STOPPED) from None
    _say(f"{out}: {_how_far(done)}")


def _at_work(job: Job, workers: int | None, show: Callable[[Status], object]) -> Status:
    """Explain what is left, in so many processes; a single one is this one."""
    if workers == 1 or (workers is None and len(job.units) == 1):
        return job.work(on_done=lambda _: show(job.status()))
    return launch(job, workers, on_progress=show)


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[who]}"),
    )
    return Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )


def status(folder: Path) -> None:
    """Print how far a job is."""
    now, told = status_of(folder), told_words(folder)
    _say(f"{folder}: {_how_far(now)}")
    if now.at_work or now.abandoned:
        gone = f", {now.abandoned} left by processes that are no more" if now.abandoned else ""
        _say(f"chunks that workers are at: {now.at_work}{gone}")
    if not now.finished and now.per_second and now.at_work:
        _say(f"{now.per_second:,.0f} rows/s lately; {_time(now.seconds_left)} to go")
    if not now.finished and told:
        _say(f"to go on: {Words.told(told).command(folder)}")


def _how_far(now: Status) -> str:
    rows = f"{now.done:,} of {now.rows:,} rows are explained"
    return f"all {now.rows:,} rows are explained" if now.finished else f"{rows} ({now.done / now.rows:.1%})"


def _time(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
    )


def verify(folder: Path, sample: int | None, policy: str | None, prepare: str | None, seed: int) -> None:
    """Print whether a job is as it was written, and end with 1 where it is not."""
    if sample is None:
        home = JobFolder(folder)
        stored = stored_in(home)
        done = sorted(stored.units.among(home.all_done()))
        changed = tuple(unit for unit in done if not stored.is_as_written(unit))
        found = Verified(len(done), changed, (), ())
    else:
        found = _job_again(folder, policy, prepare).verify(sample, seed)
    _say(
        f"{found.chunks} chunks were read: {_listed(found.changed, 'not as they were written') or 'as written'}"
    )
    if found.again:
        came = _listed(found.differ, "come out otherwise") or "the same"
        _say(f"{len(found.again)} were explained again: {came}")
    if not found.ok:
        raise typer.Exit(1)


def _job_again(folder: Path, policy: str | None, prepare: str | None) -> Job:
    """The job of a folder, in the words that it was begun with.

    A folder may be anyone's: what would be imported is taken from the caller alone.

    Raises:
        ValueError: the folder says what would be imported, and the caller does not.
    """
    told = told_words(folder)
    if not told:
        JobFolder(folder).told()  # which says if it is none at all
        raise ValueError(
            f"{folder} was not begun with tdhook dataset explain: verify it in Python, job.verify()"
        )
    given = {name: text for name, text in (("policy", policy), ("prepare", prepare)) if text is not None}
    words = Words.told({**told, **given})
    for name, text in (("policy", words.policy), ("prepare", words.prepare)):
        if name not in given and text is not None and (name == "prepare" or is_imported(text)):
            raise ValueError(
                f"{folder} says that its {name} is {text}, which would be imported: if that is what the job was begun "
                f"with, say so, --{name} {text}"
            )
    return _job_of(words, folder)[0]


def finished(folder: Path) -> Result:
    """What a job has made.

    Raises:
        ValueError: it is not finished.
    """
    now, told = status_of(folder), told_words(folder)
    if not now.finished:
        go_on = f": go on, {Words.told(told).command(folder)}" if told else ""
        raise ValueError(f"{folder}: {_how_far(now)}{go_on}")
    return open_result(folder)


def _listed(units: Sequence[int], what: str) -> str:
    shown = ", ".join(map(str, units[:10])) + (", ..." if len(units) > 10 else "")
    return f"{len(units)} {what} (chunks {shown})" if units else ""


def _say(text: str) -> None:
    Console().print(Text(visible(text)), soft_wrap=True)


def reduce(
    folder: Path,
    text: str | None,
    by: str | None,
    keys: tuple[str, ...],
    source: Path | None,
    out: Path | None,
) -> None:
    """Print what rows were reduced to, or reduce those that were kept."""
    result, told = finished(folder), told_words(folder)
    features, actions = (names_in(told, what) for what in ("features", "actions"))
    if text is None:
        reduced, reducers = result.reduced, result.reducers
        if not reduced:
            raise ValueError(f"{folder} has reduced rows to nothing: say to what, --reduce moments")
    else:
        rows = source_of(folder, source)
        inputs = inputs_of(result)
        if not inputs:
            raise ValueError(
                f"{folder} has kept no relevance of rows: begin another job, with --keep, or with this --reduce"
            )
        made = reducers_of(text, by, keys, rows, inputs)
        reducers = {one.name: one for one in made}
        reduced = reduce_kept(result, made, rows)
    for table in reduced_tables(reduced, reducers, features, actions):
        Console().print(table)
    if out is not None:
        for name, found in reduced.items():
            save(found, out / name)
        _say(f"wrote {', '.join(str(out / name) for name in reduced)}")


def inputs_of(result: Result) -> list[NestedKey]:
    """The inputs whose relevance was kept."""
    above = parts_of(result.attribution_key)
    kept = [parts_of(key) for key in result.stored.layout.entries]
    return [
        unravel_key(key[len(above) :]) for key in kept if key[: len(above)] == above and len(key) > len(above)
    ]


def source_of(folder: Path, source: Path | None) -> Rows | None:
    """The rows of a job, where they lie or are said to lie; ``None`` where they are there no longer."""
    told = told_words(folder)
    place = told.get("source") if source is None else source
    if place is None or (source is None and not Path(str(place)).is_dir()):
        return None
    which = told.get("rows")
    return chosen(opened(str(place)), None if which is None else _stretch(str(which)))


def names_in(told: dict[str, object], what: str) -> list[str]:
    """Names of features or actions, as far as they are known."""
    names = told.get(what)
    return list(map(str, names)) if isinstance(names, list) else []
