"""Who a rank is, from Slurm's variables."""

import pytest

from launch.cluster.rank import rank_environment
from launch.ranks import Meeting

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "20001",
}


def test_a_task_is_a_rank() -> None:
    assert rank_environment(TASK) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
    }


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "127.0.1.1", "::1", ""])
def test_nodes_do_not_meet_each_at_itself(address: str) -> None:
    with pytest.raises(ValueError, match=f"MASTER_ADDR={address}: ranks on 2 nodes must meet at an address that all"):
        rank_environment(TASK | {"MASTER_ADDR": address})


def test_one_node_may() -> None:
    alone = TASK | {"SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": "localhost"}
    assert rank_environment(alone)["LOCAL_WORLD_SIZE"] == "8"


def test_uneven_nodes() -> None:
    with pytest.raises(ValueError, match="7 tasks do not spread evenly over 2 nodes"):
        rank_environment(TASK | {"SLURM_STEP_NUM_TASKS": "7"})


@pytest.mark.parametrize("name", sorted(set(TASK) - {"MASTER_ADDR"}))
def test_outside_of_a_job(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not set as srun sets it: submit runs with `steppe submit`"):
        rank_environment({key: value for key, value in TASK.items() if key != name})


def test_launchers_of_several_nodes_meet_at_the_first() -> None:
    options = Meeting("steppe-12-1", "n1", 20001, nodes=4, node=3).launch_options
    assert (options["min_nodes"], options["max_nodes"], options["rdzv_configs"]["rank"]) == (4, 4, 3)
    assert (options["rdzv_backend"], options["rdzv_endpoint"]) == ("static", "n1:20001")
