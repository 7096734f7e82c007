"""The commands of whole data sets, ``tdhook dataset``: what can be typed, and what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tdhook.cli.errors import notes, require, require_one_way, user_errors
from tdhook.cli.words import Words

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Explain a whole data set, such as a replay buffer, with as many processes as there are.",
)

# typer reads these at run time, and older ones do not know str | None
MaybeText = Optional[str]  # noqa: UP045
MaybeNumber = Optional[int]  # noqa: UP045
MaybePath = Optional[Path]  # noqa: UP045

Folder = Annotated[
    Path, typer.Argument(help="The folder of a job, what `explain` has as `--out`.", metavar="DIR")
]
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy",
        help="A checkpoint that `tdhook.rl.save_policy` wrote, or `package.module:function`, which returns a policy.",
        metavar="CKPT_OR_IMPORT",
    ),
]
_SOURCE_HELP = (
    "Where rows are: what `TensorDict.memmap` or `ReplayBuffer.dumps` wrote, or one of Minari or LeRobot"
)
_REDUCE_HELP = (
    "What is made of all rows, with commas: `moments`, `histogram` (`histogram:pooled` counts all features "
    "together), `top:N` (the rows with the largest relevance), `sample:N` (rows drawn by chance); or `none`."
)
_BY_HELP = (
    "Tell rows apart by this entry of the source; by default by the action, if there are such, or `none`."
)
By = Annotated[MaybeText, typer.Option(help=_BY_HELP, metavar="KEY")]
Keys = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--key", help="Reduce the relevance of this input; by default of each. Repeatable.", metavar="KEY"
    ),
]


@app.command(
    epilog="**Examples**\n\n"
    "tdhook dataset explain --policy cartpole.pt --source buffer --out job\n\n"
    "tdhook dataset explain --policy my.policies:atari --prepare my.policies:numbers --source frames --out job "
    "--keep compressed --workers 8\n\n"
    "The same words again go on where they were stopped."
)
@user_errors()
def explain(
    context: typer.Context,
    policy: PolicyOption,
    source: Annotated[Path, typer.Option(help=f"{_SOURCE_HELP}.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="Folder of the job.", metavar="DIR")],
    composite: Annotated[
        str, typer.Option(help="A preset or a file, as `tdhook explain` takes it.", metavar="NAME_OR_FILE")
    ] = Words.composite,
    method: Annotated[
        MaybeText,
        typer.Option(help="Another method than LRP, as `tdhook explain` takes it.", metavar="NAME_OR_FILE"),
    ] = Words.method,
    baseline: Annotated[
        MaybeText,
        typer.Option(
            help="What each row is compared with, as `tdhook explain` takes it.", metavar="BASELINE"
        ),
    ] = None,
    target: Annotated[
        MaybeText,
        typer.Option(help="What is explained, as `tdhook explain` takes it.", metavar="KEY[:INDEX]"),
    ] = None,
    prepare: Annotated[
        MaybeText,
        typer.Option(
            help="`package.module:function`, which makes rows what the policy reads: numbers of bytes, say.",
            metavar="IMPORT",
        ),
    ] = None,
    rows: Annotated[
        MaybeText,
        typer.Option(
            help="Only these rows of the source, as `1000:2000` or `::10`; results number them from 0 on.",
            metavar="A:B[:STEP]",
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            help="What is written of each row: `all`, `bfloat16`, `compressed` or `none`.", metavar="WHAT"
        ),
    ] = Words.keep,
    reduce: Annotated[str, typer.Option(help=_REDUCE_HELP, metavar="WORDS")] = Words.reduce,
    by: By = None,
    key: Keys = None,
    in_order: Annotated[
        bool,
        typer.Option(
            "--in-order", help="Rows are steps in order of time, as `--baseline previous` needs them."
        ),
    ] = False,
    workers: Annotated[
        MaybeNumber,
        typer.Option(min=1, help="How many processes; by default one for each core."),
    ] = None,
    chunk: Annotated[
        MaybeNumber,
        typer.Option(min=1, help="How many rows are committed together; by default by their size."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = Words.seed,
) -> None:
    """Explain each row of a data set, once, and write what is kept of it into the folder of a job.

    Any number of these commands, on any machine that sees the folder, work on the same job. What is written does not
    depend on how many there are. A command that was stopped is given again, in the same words, and goes on.
    """
    require("torchrl")
    from tdhook.cli.jobs import explain

    with notes():
        require_one_way(context, method)
        words = Words(
            policy=policy, source=str(source.absolute()), composite=composite, method=method, baseline=baseline,
            target=target, prepare=prepare, rows=rows, keep=keep, reduce=reduce, by=by, key=tuple(key or ()),
            in_order=in_order, chunk=chunk, seed=seed,
        )  # fmt: skip
        explain(words, out, workers)


@app.command()
@user_errors()
def status(folder: Folder) -> None:
    """Say how far a job is, who is at work, and how long it takes yet."""
    from tdhook.cli.jobs import status

    status(folder)


@app.command()
@user_errors()
def verify(
    folder: Folder,
    sample: Annotated[
        MaybeNumber,
        typer.Option(
            min=1, help="Explain so many chunks again, drawn by chance, and compare. Needs the policy."
        ),
    ] = None,
    policy: Annotated[
        MaybeText,
        typer.Option(
            "--policy",
            help="That of the job; by default the checkpoint that it was begun with. What is imported is to be said.",
            metavar="CKPT_OR_IMPORT",
        ),
    ] = None,
    prepare: Annotated[
        MaybeText,
        typer.Option(
            help="That of the job, if it has one: `package.module:function` is to be said, too.",
            metavar="IMPORT",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Look whether what lies on the disk is what was written; ends with 1 where it is not."""
    from tdhook.cli.jobs import verify

    with notes():
        verify(folder, sample, policy, prepare, seed)


@app.command()
@user_errors()
def reduce(
    folder: Folder,
    reduce: Annotated[
        MaybeText,
        typer.Option(
            help=f"{_REDUCE_HELP} By default what the job has reduced rows to is shown.", metavar="WORDS"
        ),
    ] = None,
    by: By = None,
    key: Keys = None,
    source: Annotated[
        MaybePath,
        typer.Option(help=f"{_SOURCE_HELP}; by default that of the job.", metavar="DIR"),
    ] = None,
    out: Annotated[
        MaybePath,
        typer.Option(
            help="Folder to write the numbers to, as a memory-mapped TensorDict each.", metavar="DIR"
        ),
    ] = None,
) -> None:
    """Show what rows were reduced to, or reduce those that were kept, to something else."""
    from tdhook.cli.jobs import reduce as run

    with notes():
        run(folder, reduce, by, tuple(key or ()), source, out)


@app.command()
@user_errors()
def report(
    folder: Folder,
    out: Annotated[
        MaybePath,
        typer.Option(help="File to write; by default report.html in the folder.", metavar="FILE"),
    ] = None,
    source: Annotated[
        MaybePath,
        typer.Option(help=f"{_SOURCE_HELP}, for the frames; by default that of the job.", metavar="DIR"),
    ] = None,
    pooled: Annotated[
        MaybeNumber,
        typer.Option(
            min=1, help="Side of the blocks by which clusters compare pictures; by default by their size."
        ),
    ] = None,
    clusters: Annotated[
        MaybeNumber,
        typer.Option(
            min=1, help="How many strategies are told apart; by default as many as the spectrum shows."
        ),
    ] = None,
    title: Annotated[MaybeText, typer.Option(help="Of the page.", metavar="TEXT")] = None,
) -> None:
    """Make one HTML page of a whole data set: relevance by action, extreme rows, and the strategies of the policy.

    Strategies need scikit-learn (extra `clusters`) and a sample of rows; without, the page has the rest.
    """
    from tdhook.cli.dataset_report import run

    with notes():
        run(folder, out, source, pooled, clusters, title)
