"""Slurm's variables as those that launchers of several processes have in common.

Inside `srun`, every task is told its place by variables of Slurm's own ("Output environment
variables" in the manual page of srun).
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

PLACES = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}
FIRST_PORT, PORTS = 20_000, 10_000
_HOST = re.compile(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^,]*)")


def adopt(environment: MutableMapping[str, str]) -> None:
    """Add the common variables where this process is one of several tasks of a step, and no other
    launcher has set them.

    A batch script is no step, and neither is a shell in an allocation: what is started there is one
    process. A task that sees one device of its own takes that, whichever number it has itself.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if "RANK" in environment or not tasks.isdigit() or int(tasks) < 2:
        return
    common = {name: environment.get(theirs, "") for name, theirs in PLACES.items()}
    if re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", "")):
        common["LOCAL_RANK"] = "0"
    common["MASTER_ADDR"] = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    common["MASTER_PORT"] = str(_port(environment))
    for name, value in common.items():
        environment.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first of a list in Slurm's short form: "gpu[03-05,9]-ib,login" begins with gpu03-ib."""
    found = _HOST.match(nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def _port(environment: MutableMapping[str, str]) -> int:
    """The same in all tasks of a step, another one in most other steps."""
    said = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    job, step = (int(number) if number.isdigit() else 0 for number in said)
    return FIRST_PORT + (17 * job + step) % PORTS
