"""The variables of each kind of cluster, as its documentation has them, give the same place."""

import pytest

from entrypoint.nodes.cluster import Place, find_place, first_host, hint
from trainer.spec.errors import SettingsError

CLUSTERS = {
    "TrainJob": {
        "PET_NNODES": "3",
        "PET_NODE_RANK": "1",
        "PET_NPROC_PER_NODE": "8",
        "PET_MASTER_ADDR": "10.0.0.1",
        "PET_MASTER_PORT": "29400",
    },
    "RunPod": {
        "NUM_NODES": "3",
        "NODE_RANK": "1",
        "NUM_TRAINERS": "8",
        "WORLD_SIZE": "24",
        "PRIMARY_ADDR": "10.0.0.1",
        "MASTER_ADDR": "10.0.0.1",
        "PRIMARY_PORT": "29400",
        "MASTER_PORT": "29400",
        "NODE_ADDR": "10.0.0.2/24",
    },
    "torchrun": {
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "3",
        "RANK": "1",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29400",
    },
    "PyTorchJob": {"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"},
    "processes": {
        "WORLD_SIZE": "24",
        "RANK": "8",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29400",
    },
    "SkyPilot": {
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "3",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3\n",
    },
    "dstack": {
        "DSTACK_NODE_RANK": "1",
        "DSTACK_NODES_NUM": "3",
        "DSTACK_MASTER_NODE_IP": "10.0.0.1",
        "DSTACK_GPUS_PER_NODE": "8",
    },
    "Slurm": {
        "SLURM_NODEID": "1",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NNODES": "3",
        "SLURM_JOB_NODELIST": "10.0.0.[1-3]",
    },
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_says_the_same(name):
    found = find_place(0, CLUSTERS[name])
    port = 29400 if any("PORT" in variable for variable in CLUSTERS[name]) else 29500
    assert (found.rank, found.count, found.address, found.port) == (1, 3, "10.0.0.1", port)
    assert not found.is_first and found == find_place(3, CLUSTERS[name])
    assert "NODES=auto" in hint(CLUSTERS[name])


@pytest.mark.parametrize("name", CLUSTERS)
def test_nothing_of_it_is_read_unless_nodes_asks_for_it(name):
    assert find_place(1, CLUSTERS[name]) == Place()


def test_an_indexed_job_of_kubernetes_needs_the_number_and_the_address():
    given = {"JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "job-0.job"}
    assert find_place(2, given).address == "job-0.job" and hint(given) is None
    with pytest.raises(SettingsError, match="nothing says how many nodes there are"):
        find_place(0, given)


def test_auto_without_a_cluster_is_one_machine():
    assert find_place(0, {"PATH": "/bin", "NODE_RANK": " "}) == Place() and hint({}) is None
    alone = {**CLUSTERS["SkyPilot"], "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"}
    assert find_place(0, alone) == Place() and hint(alone) is None


@pytest.mark.parametrize(
    ("asked", "given", "said"),
    [
        (2, {}, "NODES=2: nothing says which node this is"),
        (0, {"WORLD_SIZE": "4"}, "NODES=auto: nothing says which node this is"),
        (2, {"NODE_RANK": "0"}, "nothing says where node 0 is: MASTER_ADDR is not set"),
        (2, {"NODE_RANK": "2", "MASTER_ADDR": "a"}, r"NODE_RANK=2, but there are 2 nodes \(NODES\)\. Allowed: 0 to 1"),
        (2, {"NODE_RANK": "x", "MASTER_ADDR": "a"}, "NODE_RANK=.?x.? is no number from 0 to"),
        (2, {"NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT=.*1 to 65535"),
        (2, CLUSTERS["SkyPilot"], r"NODES=2, but the cluster has 3 nodes \(SKYPILOT_NUM_NODES=3\)"),
        (0, {**CLUSTERS["Slurm"], "SLURM_LOCALID": "1"}, "SLURM_LOCALID=.*--ntasks-per-node=1"),
        (0, {**CLUSTERS["torchrun"], "LOCAL_RANK": "3"}, "LOCAL_RANK=.*--nproc-per-node=1"),
    ],
)
def test_what_is_missing_or_wrong_is_named_with_the_fix(asked, given, said):
    with pytest.raises(SettingsError, match=said):
        find_place(asked, given)


def test_a_range_of_torchrun_needs_a_number():
    elastic = {**CLUSTERS["TrainJob"], "PET_NNODES": "1:4"}
    assert find_place(3, elastic).count == 3
    with pytest.raises(SettingsError, match="PET_NNODES="):
        find_place(0, elastic)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu01", "gpu01"),
        ("gpu01,gpu02", "gpu01"),
        ("gpu[03-05,09],login", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("rack1-gpu[003-004].cluster", "rack1-gpu003.cluster"),
        ("a,gpu[1-2]", "a"),
        ("10.0.0.1\n10.0.0.2", "10.0.0.1"),
        ("10.65.0.2/24", "10.65.0.2"),
    ],
)
def test_the_first_of_a_list_of_machines(text, expected):
    assert first_host(text) == expected
