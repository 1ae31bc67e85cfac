"""A task of a Slurm step knows its place without further help."""

from __future__ import annotations

import pytest

from tuner.slurm import adopt, first_host
from tuner.worker import BadEnvironment, Seat, seat

TASK = {  # of `srun --nodes 2 --ntasks-per-node 2`, its fourth
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
}


def test_a_task_has_its_place() -> None:
    task = dict(TASK)
    adopt(task)
    assert seat(task) == Seat(3, 4)
    assert (task["LOCAL_RANK"], task["MASTER_ADDR"]) == ("1", "gpu07")
    first = {**TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    adopt(first)
    assert first["MASTER_PORT"] == task["MASTER_PORT"]  # all of a step meet
    assert 20_000 <= int(task["MASTER_PORT"]) < 30_000
    other = {**TASK, "SLURM_STEP_ID": "4"}
    adopt(other)
    assert other["MASTER_PORT"] != task["MASTER_PORT"]


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty bash`
        {"SLURM_STEP_NUM_TASKS": ""},  # a batch script, which has the job's other variables
        {"RANK": "0"},  # torchrun under srun
    ],
)
def test_what_is_no_task_of_several_is_left_alone(changes: dict[str, str]) -> None:
    environment = {**TASK, **changes}
    before = dict(environment)
    adopt(environment)
    assert environment == before


def test_what_a_person_sets_counts_first() -> None:
    task = {**TASK, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    adopt(task)
    assert (task["MASTER_ADDR"], task["MASTER_PORT"]) == ("10.0.0.7", "29500")


@pytest.mark.parametrize(("seen", "local"), [("2", "0"), ("0,1,2,3", "1"), ("", "1")])
def test_a_task_with_one_device_of_its_own_takes_that(seen: str, local: str) -> None:
    task = {**TASK, "CUDA_VISIBLE_DEVICES": seen}  # one each with --gpus-per-task 1
    adopt(task)
    assert task["LOCAL_RANK"] == local


def test_what_is_missing_is_said() -> None:
    task = {name: value for name, value in TASK.items() if name != "SLURM_STEP_NODELIST"}
    adopt(task)
    with pytest.raises(BadEnvironment, match="but not MASTER_ADDR"):
        seat(task)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("a1,a2", "a1"),
        ("gpu[03-05,9]", "gpu03"),
        ("gpu[3,5-7]-ib,login", "gpu3-ib"),
        ("node[001-100],other[1-2]", "node001"),
        ("", ""),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
