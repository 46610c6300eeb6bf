"""Which of how many machines this is, by the variables that clusters set.

They are read only where NODES asks for it: machines are often rented with such variables set, and a job on one of them
must not wait for others.

| cluster | this node | how many | the first node |
| --- | --- | --- | --- |
| TrainJob of Kubeflow, torchrun | PET_NODE_RANK | PET_NNODES | PET_MASTER_ADDR, PET_MASTER_PORT |
| RunPod, or by hand | NODE_RANK | NUM_NODES, NNODES | MASTER_ADDR or PRIMARY_ADDR, and _PORT |
| a program that torchrun starts | GROUP_RANK | GROUP_WORLD_SIZE | MASTER_ADDR, MASTER_PORT |
| SkyPilot | SKYPILOT_NODE_RANK | SKYPILOT_NUM_NODES | first of SKYPILOT_NODE_IPS |
| dstack | DSTACK_NODE_RANK | DSTACK_NODES_NUM | DSTACK_MASTER_NODE_IP |
| Slurm | SLURM_NODEID | SLURM_STEP_NUM_NODES, SLURM_NNODES | first of SLURM_STEP_NODELIST, SLURM_JOB_NODELIST |
| PyTorchJob and the like | RANK / LOCAL_WORLD_SIZE | WORLD_SIZE / LOCAL_WORLD_SIZE | MASTER_ADDR, MASTER_PORT |
| an indexed Job of Kubernetes | JOB_COMPLETION_INDEX | NODES | MASTER_ADDR, MASTER_PORT |

The first line of this table whose variable for the node is set counts. MASTER_ADDR and MASTER_PORT win over the names
of a cluster, so that they can be set by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.spec.errors import SettingsError
from trainer.spec.values import as_integer, show

DEFAULT_PORT = 29500  # torch's
LARGEST_PORT = 65535
HOW = "Fix: set NODE_RANK (0 to NODES - 1), MASTER_ADDR (the address of node 0) and NODES, or NODES=1."


@dataclass(frozen=True)
class Cluster:
    """The names of one kind of cluster. Of several names for the same, the first that is set counts."""

    title: str
    rank: str
    count: tuple[str, ...] = ()
    address: tuple[str, ...] = ()  # the value may be a list, of which the first counts
    port: tuple[str, ...] = ()
    counts_processes: bool = False  # rank and count are of processes, LOCAL_WORLD_SIZE to a node


CLUSTERS = (
    Cluster("torchrun", "PET_NODE_RANK", ("PET_NNODES",), ("PET_MASTER_ADDR",), ("PET_MASTER_PORT",)),
    Cluster("NODE_RANK", "NODE_RANK", ("NUM_NODES", "NNODES"), ("PRIMARY_ADDR",), ("PRIMARY_PORT",)),
    Cluster("torchrun", "GROUP_RANK", ("GROUP_WORLD_SIZE",)),
    Cluster("SkyPilot", "SKYPILOT_NODE_RANK", ("SKYPILOT_NUM_NODES",), ("SKYPILOT_NODE_IPS",)),
    Cluster("dstack", "DSTACK_NODE_RANK", ("DSTACK_NODES_NUM",), ("DSTACK_MASTER_NODE_IP",)),
    Cluster(
        "Slurm",
        "SLURM_NODEID",
        ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
        ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
    ),
    Cluster("WORLD_SIZE", "RANK", ("WORLD_SIZE",), counts_processes=True),
    Cluster("Kubernetes", "JOB_COMPLETION_INDEX"),
)
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")  # above 0: a second entrypoint on the same node


@dataclass(frozen=True)
class Place:
    """This node among `count`. `address`, `port`: where the first one listens. `said_by`: the variables, for logs."""

    rank: int = 0
    count: int = 1
    address: str = ""
    port: int = DEFAULT_PORT
    said_by: str = ""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        return f"node {self.rank} of {self.count}, by {self.said_by}; node 0 is {self.address}:{self.port}"


def find_place(asked: int, environ: Mapping[str, str]) -> Place:
    """This node's place; `asked`: NODES, 0 for auto. Raises SettingsError where the variables do not tell it.

    NODES=auto without any variables of a cluster is one node.
    """
    if asked == 1:
        return Place()
    given = _given(environ)
    cluster = _cluster(given)
    if cluster is None:
        if asked == 0 and "MASTER_ADDR" not in given and "WORLD_SIZE" not in given:
            return Place()
        names = ", ".join(dict.fromkeys(cluster.rank for cluster in CLUSTERS))
        raise SettingsError(f"NODES={asked or 'auto'}: nothing says which node this is: none of {names} is set. {HOW}")
    for name in LOCAL_RANKS:
        if given.get(name, "0") != "0":
            raise SettingsError(
                f"{name}={show(given[name])}: this is not the only job on its machine, and one entrypoint starts the "
                "trainers of all its GPUs. Fix: one task for each machine (srun --ntasks-per-node=1, torchrun "
                "--nproc-per-node=1), and NUM_GPUS."
            )
    count, count_name = _count(asked, cluster, given)
    if count == 1:
        return Place()
    local = _number(given, "LOCAL_WORLD_SIZE", 1, 1) if cluster.counts_processes else 1
    rank = _number(given, cluster.rank, 0) // local
    if rank >= count:
        said = f"{cluster.rank}={given[cluster.rank]}, but there are {count} nodes ({count_name})"
        raise SettingsError(f"{said}. Allowed: 0 to {count - 1}.")
    address_name = next((name for name in ("MASTER_ADDR", *cluster.address) if name in given), None)
    if address_name is None:
        raise SettingsError(f"NODES={asked or 'auto'}: nothing says where node 0 is: MASTER_ADDR is not set. {HOW}")
    port_name = next((name for name in ("MASTER_PORT", *cluster.port) if name in given), "MASTER_PORT")
    port = _number(given, port_name, DEFAULT_PORT, 1, LARGEST_PORT)
    said_by = ", ".join(dict.fromkeys((cluster.rank, count_name, address_name)))
    return Place(rank, count, first_host(given[address_name]), port, said_by)


def is_another(asked: str, environ: Mapping[str, str]) -> bool:
    """Whether this is another node than the first, as far as that is said, be the variables right or not.

    `asked`: NODES as it was given. For those who cannot wait until everything has been checked.
    """
    given = _given(environ)
    cluster = _cluster(given)
    return asked not in ("", "1") and cluster is not None and as_integer(given[cluster.rank]) not in (None, 0)


def is_in_one(environ: Mapping[str, str]) -> bool:
    """Whether a cluster says which node this is."""
    return _cluster(_given(environ)) is not None


def hint(environ: Mapping[str, str]) -> str | None:
    """What to say where NODES is 1 and a cluster's variables are there; None without such variables."""
    given = _given(environ)
    cluster = _cluster(given)
    if cluster is None or not cluster.count:
        return None
    for name in cluster.count:
        number = as_integer(given.get(name, ""))
        if number is not None and number > 1:
            return (
                f"{name}={number} is a cluster's and is not read: this job trains on this machine alone. NODES=auto "
                "trains on all of the cluster's machines together (docs/nodes.md)."
            )
    return None


def first_host(text: str) -> str:
    """The first address of a list: lines, commas, or Slurm's form: "gpu[03-05,9],login" is gpu03 first."""
    first = text.split()[0]
    match = re.match(r"([^,\[]*)\[([^\],\-]+)[^\]]*\]([^,\[]*)", first)
    if match:
        return match[1] + match[2] + match[3]
    return first.partition(",")[0].partition("/")[0]


def _given(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value.strip() for name, value in environ.items() if value.strip()}


def _cluster(given: Mapping[str, str]) -> Cluster | None:
    return next((cluster for cluster in CLUSTERS if cluster.rank in given), None)


def _count(asked: int, cluster: Cluster, given: Mapping[str, str]) -> tuple[int, str]:
    """How many nodes there are, and the variable that says so."""
    name = next((name for name in cluster.count if name in given), None)
    if name is None:
        if not asked:
            raise SettingsError(f"NODES=auto: {cluster.rank} is set, but nothing says how many nodes there are. {HOW}")
        return asked, "NODES"
    local = _number(given, "LOCAL_WORLD_SIZE", 1, 1) if cluster.counts_processes else 1
    if asked and not re.fullmatch(r"\d+", given[name]):
        return asked, "NODES"  # torchrun's elastic "1:4"
    count = _number(given, name, 1, 1) // local
    if asked and asked != count:
        raise SettingsError(
            f"NODES={asked}, but the cluster has {count} nodes ({name}={given[name]}). Fix: NODES=auto, or as many."
        )
    return count, name


def _number(given: Mapping[str, str], name: str, default: int, low: int = 0, high: int = 10**6) -> int:
    if name not in given:
        return default
    value = as_integer(given[name])
    if value is None or not low <= value <= high:
        raise SettingsError(f"{name}={show(given[name])} is no number from {low} to {high}, which NODES needs. {HOW}")
    return value
