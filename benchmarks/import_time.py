"""How long `import tdhook` takes, as a ratio to `import torch, tensordict`: `python -m benchmarks.import_time`.

Each import runs in an interpreter of its own. Rounds are interleaved, so that a busy moment of the machine hits all
alike, and medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

FLOOR = "import torch, tensordict"
STATEMENTS = (FLOOR, "import tdhook", "from tdhook import LRP")
TIMED = "import time; start = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """Import once, in a fresh interpreter."""
    script = TIMED.format(statement=statement)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(run.stdout)


def main(argv: list[str] | None = None) -> None:
    """Print a line per statement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args(argv).rounds
    for statement in STATEMENTS:  # unmeasured: fills the disk cache
        seconds(statement)
    times = [[seconds(statement) for statement in STATEMENTS] for _ in range(rounds)]
    medians = dict(zip(STATEMENTS, map(statistics.median, zip(*times, strict=True)), strict=True))
    for statement, median in medians.items():
        print(f"{statement:<26} {median:7.3f} s  {median / medians[FLOOR]:6.3f}x")


if __name__ == "__main__":
    main()
