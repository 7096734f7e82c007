"""The commands. What they do is in the library; here is what can be typed, and what it means.

Only typer and rich are imported with this module, so that ``tdhook --help`` answers at once.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

import tdhook
from tdhook.cli import dataset
from tdhook.cli.errors import notes, require, require_one_way, user_errors

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Explain what a policy did: layer-wise relevance propagation for TensorDict models.",
    epilog="Start with `tdhook demo`. With `TDHOOK_TRACEBACK=1` in the environment, errors show "
    "where they arose.",
)

app.add_typer(dataset.app, name="dataset")

_POLICY_HELP = (
    "A checkpoint that `tdhook.rl.save_policy` wrote (plain data: opening it runs no code), or "
    "`package.module:function`, which is imported and called without arguments, and returns a "
    "TensorDictModule or a `tdhook.rl.Policy`."
)
_TARGET_HELP = (
    "What is explained: a key that the policy writes, nested with dots, and an index into its last axis: a number, "
    "`argmax`, `action` (the one that was taken), `all` (each on its own), "
    "`none` (the whole output) or `@KEY` (the entry that holds the index). By default "
    "action_value:action or logits:action, whichever the policy has."
)

Composite = Annotated[
    str,
    typer.Option(
        help="Name of a preset, with parameters as in `epsilon_gamma_box:low=-1,high=1`; or a TOML or JSON "
        "file. `tdhook rules` lists the presets.",
        metavar="NAME_OR_FILE",
    ),
]
_BASELINE_HELP = (
    "What each step is compared with, so that the difference is explained, all of which arrives at the inputs: a "
    "number, `mean` (of the rollout), `previous` (the step before), `sample:N` (so many steps drawn from the rollout), "
    "`blur:WIDTH` (the picture out of focus), `@KEY` (an entry), or one for each key, `pixels=blur:3,speed=0`"
)
Baseline = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help=f"{_BASELINE_HELP}; by default that of the composite file, or `none`.", metavar="BASELINE"
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Steps to act, through as many episodes as they take.")]
Seed = Annotated[int, typer.Option(help="Of the environment and of sampled actions.")]
Out = Annotated[Path, typer.Option(help="Folder to write to.", metavar="DIR")]
PolicyText = Annotated[str, typer.Option("--policy", help=_POLICY_HELP, metavar="CKPT_OR_IMPORT")]
EnvId = Annotated[
    Optional[str],  # noqa: UP045 (typer reads this at run time, and older ones do not know str | None)
    typer.Option(
        "--env", help="Gymnasium id of the environment; by default the one in the checkpoint.", metavar="ID"
    ),
]
Frames = Annotated[
    bool,
    typer.Option("--frames", help="Render the environment at each step, too, for `tdhook video`."),
]


def _version(asked: bool) -> None:
    if asked:
        Console().print(f"tdhook {tdhook.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="**Examples**\n\n"
    "tdhook demo\n\n"
    "tdhook demo --steps 200 --composite excitation_backprop --out somewhere\n\n"
    "**Afterwards**\n\n"
    'TensorDict.load_memmap("demo-output/rollout")["attr", "observation"]'
)
@user_errors()
def demo(
    out: Out = Path("demo-output"),
    steps: Steps = 500,
    composite: Composite = "epsilon_plus",
    baseline: Annotated[
        str, typer.Option(help=f"{_BASELINE_HELP}; `none` to explain values.", metavar="BASELINE")
    ] = "mean",
    seed: Seed = 0,
    frames: Frames = False,
) -> None:
    """Let trained policies act, and explain each of their actions.

    One balances the pole of CartPole; one sees the pixels of Freeway, where ale-py is installed, and its output is in a
    folder of its own. Each acts in the real environment, through an attribution context: it acts as it always does, and
    each step also says how much every entry of the observation had to do with the action taken, compared with the mean
    observation. Printed are the return,
    the mean relevance of each feature by action, and whether relevance was conserved; written are the explained
    rollout, pictures of it, the printed numbers as JSON, and a page to look through it step by step.
    """
    require("torchrl", "gymnasium", "matplotlib")
    from tdhook.cli import report
    from tdhook.cli.explanations import Request, run
    from tdhook.configuration import read_baseline, read_composite
    from tdhook.rl import demo_policy

    policies = {"cartpole": out}
    if find_spec("ale_py") is None:
        Console(stderr=True).print(
            'note: ale-py is not installed, so no policy that sees pixels is shown: pip install "tdhook\\[atari]"'
        )
    else:
        policies["freeway"] = out / "freeway"
    with notes():
        rules = read_composite(composite)
        against = None if baseline == "none" else (read_baseline(baseline), baseline)
        for name, folder in policies.items():
            request = Request(demo_policy(name), rules, composite, None, steps, seed, (), frames, against)
            run(request, folder)
            report.run(folder, None)


@app.command(
    epilog="**Examples**\n\n"
    "tdhook explain --policy cartpole.pt --steps 500\n\n"
    "tdhook explain --policy cartpole.pt --composite my_rules.toml --target action_value:0 --out why-left\n\n"
    "tdhook explain --policy mypackage.policies:make_actor --env Acrobot-v1 --target logits:action\n\n"
    "tdhook explain --policy cartpole.pt --baseline previous\n\n"
    "tdhook explain --policy cartpole.pt --method integrated_gradients --tolerance 1e-3\n\n"
    "**A composite file** (first match wins; the preset takes what the pairs leave)\n\n"
    'preset = "epsilon_plus"\n\n'
    'pairs = [{ select = { reads = "observation" }, rule = "GammaRule", gamma = 0.5 }]'
)
@user_errors()
def explain(
    context: typer.Context,
    policy: PolicyText,
    env: EnvId = None,
    composite: Composite = "epsilon_plus",
    target: Annotated[Optional[str], typer.Option(help=_TARGET_HELP, metavar="KEY[:INDEX]")] = None,  # noqa: UP045
    steps: Steps = 500,
    out: Out = Path("explain-output"),
    seed: Seed = 0,
    attribute: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Give the relevance of this key, too: one that a module inside the policy writes. Repeatable.",
            metavar="KEY",
        ),
    ] = None,
    frames: Frames = False,
    baseline: Baseline = None,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Explain by another method than LRP: its name, with options as in `integrated_gradients:steps=64`, "
            "or a TOML or JSON file. `tdhook methods` lists them.",
            metavar="NAME_OR_FILE",
        ),
    ] = None,
    tolerance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Of `--method integrated_gradients`: how far the sum of relevance may be off."),
    ] = None,
) -> None:
    """Let your own policy act in a gymnasium environment, and explain each of its actions.

    Does for any policy what `tdhook demo` does for its own. A checkpoint holds numbers and names only
    (format, env, kind, architecture, features, actions, state_dict; see `tdhook.rl.save_policy`). A policy
    of any other make is given as the import path of a function that returns it; features are then called x0, x1, ...
    unless it returns a `tdhook.rl.Policy`, which names them.
    """
    require("torchrl", "gymnasium", "matplotlib")
    from tdhook.cli.explanations import Request, run
    from tdhook.cli.policies import find_policy
    from tdhook.configuration import (
        baseline_in,
        read_baseline,
        read_composite,
        read_key,
        read_method,
        read_target,
    )

    with notes():
        rules = read_composite(composite)
        if tolerance is not None and method is None:
            raise ValueError("--tolerance is one of a method: give --method integrated_gradients")
        require_one_way(context, method)
        said = {} if tolerance is None else {"tolerance": tolerance}
        chosen = None if method is None else read_method(method, **said)
        what = None if target is None else read_target(target)
        keys = tuple(read_key(key) for key in attribute or ())
        named = baseline_in(composite) if baseline is None else baseline
        against = None if named in (None, "none") else (read_baseline(named), named)
        found = find_policy(policy, env)
        run(Request(found, rules, method or composite, what, steps, seed, keys, frames, against, chosen), out)


@app.command(
    epilog="**Examples**\n\n"
    "tdhook demo --frames && tdhook video demo-output\n\n"
    "tdhook video explain-output --out why.gif --fps 15 --every 2 --steps 200"
)
@user_errors()
def video(
    folder: Annotated[
        Path,
        typer.Argument(help="What `tdhook demo --frames` or `tdhook explain --frames` wrote.", metavar="DIR"),
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="What to write, .mp4 or .gif; by default video.mp4 in the folder.", metavar="FILE"),
    ] = None,
    fps: Annotated[float, typer.Option(min=0.1, help="Pictures per second.")] = 30.0,
    every: Annotated[int, typer.Option(min=1, help="Show only each so-many-th step.")] = 1,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Show only so many steps, from the beginning."),
    ] = None,
    key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Whose relevance to show, where several keys have it.", metavar="KEY"),
    ] = None,
) -> None:
    """Show an explained rollout as a video: the environment, and beside it what each action rested on.

    Relevance of an image lies over the frame, red where it speaks for the target and blue where against; that of a
    vector is shown as bars.
    """
    require("imageio_ffmpeg", "PIL")
    from tdhook.cli.video import run
    from tdhook.configuration import read_key

    with notes():
        run(folder, out, fps, every, steps, None if key is None else read_key(key))


@app.command(
    epilog="**Examples**\n\n"
    "tdhook demo --frames && tdhook report demo-output\n\n"
    "tdhook report explain-output --out why.html"
)
@user_errors()
def report(
    folder: Annotated[
        Path, typer.Argument(help="What `tdhook demo` or `tdhook explain` wrote.", metavar="DIR")
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File to write; by default report.html in the folder.", metavar="FILE"),
    ] = None,
) -> None:
    """Make one HTML page of an explained rollout, to be opened in any browser.

    The page holds all it needs, and uses no network. It shows each step under a slider: the frame, if there are frames
    (`--frames`), and the relevance and value of each feature; relevance over time; the mean by action; the account of
    the relevance, the composite, and the versions used.
    """
    from tdhook.cli.report import run

    with notes():
        run(folder, out)


@app.command(
    epilog="**Examples**\n\n"
    "tdhook concepts --policy cartpole.pt --layer module.0.module.3\n\n"
    "tdhook concepts --policy examples.whole_data_sets:freeway --layer 0.module.1 --source buffers/freeway "
    "--prepare examples.whole_data_sets:numbers"
)
@user_errors()
def concepts(
    policy: PolicyText,
    layer: Annotated[
        str,
        typer.Option(help="Path of the module whose units are looked at, or key of a value.", metavar="PATH"),
    ],
    env: EnvId = None,
    source: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Data, as `tdhook dataset explain` takes it, instead of acting.", metavar="DIR"),
    ] = None,
    prepare: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="As `tdhook dataset explain` takes it.", metavar="IMPORT"),
    ] = None,
    composite: Composite = "epsilon_plus",
    baseline: Baseline = None,
    target: Annotated[Optional[str], typer.Option(help=_TARGET_HELP, metavar="KEY[:INDEX]")] = None,  # noqa: UP045
    axis: Annotated[
        int, typer.Option(help="Along which units lie: 1 is the first after the batch, -1 the last.")
    ] = 1,
    heads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="The axis consists of so many equal parts, each a unit.", metavar="N"),
    ] = None,
    by: Annotated[
        str, typer.Option(help="What steps are chosen by: `relevance` or `value`.", metavar="WHAT")
    ] = "relevance",
    units: Annotated[int, typer.Option(min=1, help="How many units are shown of each action.")] = 6,
    top: Annotated[int, typer.Option(min=1, help="How many steps are shown of each unit.")] = 8,
    apart: Annotated[
        int, typer.Option(min=1, help="How many rows are between any two of them, at least.")
    ] = 5,
    graph: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Draw what units of this layer hand on to those before. Repeatable, in the order of the model.",
            metavar="PATH",
        ),
    ] = None,
    steps: Steps = 1000,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="File to write.", metavar="FILE")] = Path("concepts.html"),
) -> None:
    """Make one HTML page of what the units of a layer respond to, by action.

    For each action the units are shown that matter most when it is taken, each with the steps in which it mattered most
    for this action: what was seen, the relevance that passes this unit, and the part of a picture that it sees.
    """
    require("torchrl", "gymnasium")
    from tdhook.cli.concepts import Asked, run

    with notes():
        asked = Asked(
            policy, layer, env, source, prepare, steps, seed, composite, baseline, target, axis, heads, by, units,
            top, apart, tuple(graph or ()),
        )  # fmt: skip
        run(asked, out)


@app.command(
    epilog="**Examples**\n\n"
    "tdhook plan --policy cartpole.pt\n\n"
    "tdhook plan --policy mypackage.policies:make_actor --composite epsilon_plus_flat"
)
@user_errors()
def plan(policy: PolicyText, composite: Composite = "epsilon_plus", env: EnvId = None) -> None:
    """Show which rule each module of a policy gets, and which get none.

    Selectors that depend on execution order (`first`, `last`, `reads`,
    `writes`) are resolved on an observation of the environment, or without one in order of registration.
    """
    require("torchrl", "gymnasium")
    from tdhook.cli.policies import Stage, find_policy
    from tdhook.cli.tables import plan_table
    from tdhook.configuration import read_composite

    with notes():
        rules = read_composite(composite)
        found = find_policy(policy, env, need_env=False)
        observed = Stage.of(found, seed=0).env.reset() if found.env_id else None
        table = plan_table(found.actor, rules, observed)
    Console().print(table)


@app.command()
@user_errors()
def rules() -> None:
    """List the rules and the presets, with their formulas.

    A composite file names both: `rule = "GammaRule"` with parameters beside it, `preset =
    "epsilon_gamma_box"` likewise.
    """
    from tdhook.cli.tables import presets_table, rules_table

    console = Console()
    console.print(rules_table())
    console.print(presets_table())


@app.command()
@user_errors()
def methods() -> None:
    """List the methods besides LRP, with their formulas, what they cost, and what they need.

    A file names one: `method = "integrated_gradients"`, with its options beside it.
    """
    from tdhook.cli.tables import methods_table

    Console().print(methods_table())
