"""The environment of child processes: what they need, by name, and nothing else.

Every program is started with `child_environment`, so that neither our secrets nor those of other programs appear in a
core dump, a log of another library or /proc of a process that does not need them. `take` does the same for the
entrypoint itself, because libraries start processes of their own, which inherit what is in `os.environ`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from entrypoint.settings.variables import NAMES
from entrypoint.settings.variables.engine import BACKENDS
from entrypoint.system.secrets import is_secret
from trainer.spec.messages.secrets import in_addresses

REPOSITORY = Path(__file__).resolve().parents[2]
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # signals that the entrypoint passes on to its children
QUEUED = "KILN_QUEUED"  # set for the jobs of a queue, to the file in which a job says why it has ended
# Clusters and other launchers set these to tell a process that it is one of several. Libraries act on them, although
# our processes are none of theirs.
RANKS = (
    *("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_WORLD_SIZE", "GROUP_RANK", "ROLE_WORLD_SIZE"),
    *("ROLE_RANK", "NUM_NODES", "NODE_RANK", "NUM_TRAINERS", "MASTER_ADDR", "MASTER_PORT", "PRIMARY_ADDR"),
    "PRIMARY_PORT",
)
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "PET_", "ACCELERATE_")
VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")  # where both are set, the first is what counts
# What a program needs: the machine's own variables, then those of Python and of the libraries that we use.
NEEDED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "TERM", "NO_COLOR", "COLUMNS", "SOURCE_DATE_EPOCH", "VIRTUAL_ENV"),
    *("CC", "CXX", "CPATH", "LIBRARY_PATH"),  # of the compiler that compiled steps need
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
NEEDED_PREFIXES = (
    *("LC_", "PYTHON", "CONDA_", "MALLOC_", "MIMALLOC_", "TCMALLOC_", "KILN_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_"),
    *("TORCH", "PYTORCH_", "TRITON_", "NCCL_", "RCCL_", "GLOO_", "UCX_", "CUBLAS", "CUDNN_", "CUTE_", "CUTLASS_"),
    *("HIP", "HSA_", "ROC", "MIOPEN_", "TENSILE_", "GPU_", "FLASH_ATTENTION_"),
    *("HF_", "TRANSFORMERS_", "DIFFUSERS_", "SAFETENSORS_", "TOKENIZERS_", "BITSANDBYTES_", "BNB_"),
    *(f"{name.upper()}_" for name in BACKENDS),
    *(f"{vendor.upper()}_" for vendor in BACKENDS.values()),
)
# The same, of programs that use the network. These addresses may hold a password.
NETWORK = (
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    "HF_ENDPOINT",
)
PACKAGE_INDEX_PREFIX = "PIP_"  # which only pip needs
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")  # which only `trainer.sample` reads itself
# What its own command needs to serve the monitor page, and to say where.
PAGE = ("MONITOR_TOKEN", "RUNPOD_POD_ID", "PUBLIC_IPADDR")
PAGE_PORTS = "VAST_TCP_PORT_"
# How our programs run; the environment may set these otherwise.
DEFAULTS = {
    # OpenMP threads that spin while they wait make a CPU step many times slower once another program wants a core.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Segments that grow: memory that was freed in blocks of one size serves blocks of another.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


def child_environment(environment: Mapping[str, str], *, network: bool = False) -> dict[str, str]:
    """`environment` for a program that is started from here: what it needs.

    Of our own variables it is HF_HOME alone. The Hub's libraries are offline: everything is fetched before they run.
    With `network`, what leads to the Hub stays.
    """
    child = {**DEFAULTS, **needed(environment, network=network)}
    python_path = [str(REPOSITORY)]
    if environment.get("PYTHONPATH"):
        python_path.append(environment["PYTHONPATH"])
    child |= {"PYTHONPATH": os.pathsep.join(python_path), "PYTHONUNBUFFERED": "1"}
    if not network:
        child |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return child


def needed(environment: Mapping[str, str], *, network: bool = False) -> dict[str, str]:
    """The variables of `environment` that a program of ours may need, and none with a secret in it."""
    found = {}
    for name, value in environment.items():
        for_network = network and name in NETWORK
        without_secret = not is_secret(name) and not in_addresses(value)
        if for_network or (_is_needed(name) and without_secret):
            found[name] = value
    return found


def _is_needed(name: str) -> bool:
    if name in NAMES:  # a URL among our own may carry a signature
        return name == "HF_HOME"
    if name in RANKS or name.startswith(LAUNCHER_PREFIXES):
        return False
    return name in NEEDED or name.startswith(NEEDED_PREFIXES)


def package_index(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that tell pip where packages come from."""
    return {name: value for name, value in environment.items() if name.startswith(PACKAGE_INDEX_PREFIX)}


def tool_environment(tool: str, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for the command `tool`: sample, which downloads models, export, or monitor."""
    if tool == "monitor":
        own = {name: value for name, value in environment.items() if name in PAGE or name.startswith(PAGE_PORTS)}
        return child_environment(environment) | own
    if tool != "sample":
        return child_environment(environment)
    tokens = {name: environment[name] for name in HUB_TOKENS if name in environment}
    return child_environment(environment, network=True) | tokens


def take(environment: MutableMapping[str, str]) -> dict[str, str]:
    """A copy of `environment`, which keeps what this process and its libraries need and loses everything else."""
    taken = dict(environment)
    kept = needed(taken, network=True) | package_index(taken)
    for name in taken:
        if name not in kept:
            del environment[name]
    return taken


@contextlib.contextmanager
def offline(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Inside the context, `environment` lacks what only the network needs: for processes that inherit it."""
    removed = {}
    for name in (*NETWORK, *package_index(environment)):
        if name in environment:
            removed[name] = environment.pop(name)
    try:
        yield
    finally:
        environment.update(removed)
