"""The link between two machines is cut in the middle of the work: both go on, and nothing is lost or told wrongly.

The machines are network namespaces that a pair of virtual devices links, and torchrun has them meet over it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from a_job import SECONDS, a_job, same

import tdhook

APART = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
LINK = """
set -eu
ip link set lo up
ip link add near type veth peer name far
unshare --net sleep 600 & other=$!
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link set far netns $other
ip addr add 10.0.0.1/24 dev near && ip link set near up
there="nsenter --target $other --net"
$there ip addr add 10.0.0.2/24 dev far
$there ip link set far up
$there ip link set lo up
"""
WORK = """
meet="$PYTHON -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-id a --rdzv-endpoint 10.0.0.1:29400"
$meet --rdzv-backend c10d --rdzv-conf is_host=1 "$SCRIPT" "$OUT" >"$LOGS/near" 2>&1 &
$there $meet --rdzv-backend c10d --rdzv-conf is_host=0 "$SCRIPT" "$OUT" >"$LOGS/far" 2>&1 &
while [ "$(ls "$OUT/workers" 2>/dev/null | wc -l)" -lt 2 ]; do sleep 0.05; done
ip link set near down
echo "cut after $(ls "$OUT/done" | wc -l) chunks"
# The agents of torchrun go on waiting for each other, for five minutes: they end with this script.
until grep -q " of 38, " "$LOGS/near" && grep -q " of 38, " "$LOGS/far"; do sleep 0.1; done
"""


@pytest.mark.slow
def test_both_sides_of_a_cut_link_go_on(tmp_path: Path) -> None:
    if subprocess.run([*APART, "bash", "-c", LINK], capture_output=True).returncode:
        pytest.skip("no network namespaces may be made and linked here")
    script = Path(__file__).with_name("a_worker.py")
    done = subprocess.run(
        [*APART, "bash", "-c", LINK + WORK],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(tdhook.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "SCRIPT": str(script),
            "OUT": str(tmp_path / "job"),
            "LOGS": str(tmp_path),
            SECONDS: "0.1",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    logs = [(tmp_path / name).read_text() for name in ("near", "far")]
    assert done.returncode == 0, (done.stderr, logs)
    assert all("38 of 38, process group: False" in log for log in logs), logs
    chunks = int(done.stdout.split()[2])
    assert chunks < 38
    assert a_job(tmp_path / "whole").work().finished
    same(tmp_path / "job", tmp_path / "whole")
