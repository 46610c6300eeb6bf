"""The request for a pod: the job's variables as the pod gets them, and what must be known before money is spent."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entrypoint.dataset_config.documents import is_inline
from entrypoint.dataset_config.manifest import Manifest, read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings import Settings, checks, read_settings
from entrypoint.settings.variables import CONFIG_JSON, NAMES, ROWS
from entrypoint.settings.variables.engine import BACKENDS
from entrypoint.system import cards, secrets
from entrypoint.system.raw_value import raw_value
from trainer.spec.documents.forms import parse
from trainer.spec.errors import SettingsError
from trainer.spec.messages.secrets import without_secrets

MAX_POD_VARIABLES = 50  # RunPod's limit; docs.runpod.io/api-reference-v2, CreatePodRequest.env
MIN_CUDA_VERSION = "13.0"  # the image's torch is built for it, so the host's driver must support it
# These are not sent to a pod: the image sets them, and the values of this machine name folders that a pod lacks.
LOCAL_PATHS = ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME")
FROM_RUNPOD = "RUNPOD_SECRET_"  # RunPod replaces `{{ RUNPOD_SECRET_name }}` by the secret when the pod starts
REFERENCE = re.compile(r"\{\{\s*RUNPOD_SECRET_\w+\s*\}\}")
VOLUME_PATH = "/workspace"  # the image keeps output, cache and models below it
SSH_PORT = "22/tcp"  # to download the results with rsync

# Variables that may name a file or folder.
PATH_VARIABLES = (
    *("DATASET_NAME", "DATASET_CONFIG", "SAMPLE_PROMPTS", "MODEL_PATH", "MODEL_CONFIG_PATH", "VAE_PATH"),
    *("CLIP_L_PATH", "CLIP_G_PATH", "T5_PATH", "TEXT_ENCODER_PATH", "PARAMS_RESUME_FROM"),
    "PARAMS_TRAINING_ADAPTER",
)
PATH_KEYS = ("image_dir", "metadata_file", "conditioning_data_dir")  # of dataset.json
SOURCE_KEYS = (*PATH_KEYS, "dataset", "revision", "split", "image_column", "caption_column")
PATH_OF_THIS_MACHINE = r"[/~.]|[A-Za-z]:[\\/]|\\\\"  # absolute, relative, or of Windows
MEMORY_LINES = ("Peaks predicted", "PARAMS_BATCH_SIZE", "PARAMS_PRECISION", "Memory mode")  # of Plan.reasons


def pod_request(options: argparse.Namespace, gpu: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """The body of POST /v2/pods. The GPU's manufacturer decides which of the two images the pod gets."""
    backend = "cuda"
    for name, vendor in BACKENDS.items():
        if vendor.upper() == gpu["manufacturer"]:
            backend = name
            break
    gpu_request: dict[str, Any] = {"id": gpu["id"], "count": options.count}
    if backend == "cuda":
        gpu_request["minCudaVersion"] = MIN_CUDA_VERSION
    mounts: dict[str, Any] = {"persistent": {"size": options.volume, "path": VOLUME_PATH}}
    if options.network_volume:
        mounts = {"network": [{"volumeId": options.network_volume, "path": VOLUME_PATH}]}
    return {
        # A unique name: `RunPod.create_pod` looks for it after a lost answer.
        "name": f"{options.name}-{uuid.uuid4().hex[:8]}",
        "image": with_backend(options.image, backend),
        "args": "train",
        "cloud": options.cloud.upper(),
        "disk": options.disk,
        "env": dict(variables),
        "gpu": gpu_request,
        "mounts": mounts,
        "ports": ports(variables),
        "startSsh": True,
    }


def with_backend(image: str, backend: str) -> str:
    """`image` with the suffix that ./build.sh adds (-cuda, -rocm); unchanged if it has one, or names a digest."""
    suffixes = tuple(f"-{name}" for name in BACKENDS)
    if "@" in image or image.endswith(suffixes):
        return image
    return f"{image}-{backend}"


def ports(variables: Mapping[str, str]) -> list[str]:
    """What a pod opens: SSH, and the monitor page, which RunPod's proxy serves."""
    page = raw_value(variables, "MONITOR_PORT", is_number=True) or ROWS["MONITOR_PORT"].default
    return [SSH_PORT] if page == "0" else [SSH_PORT, f"{page}/http"]


def job_variables(environ: Mapping[str, str], *, env: Sequence[str] = (), secret: Sequence[str] = ()) -> dict[str, str]:
    """The job's variables: those of the environment, then --env, then --secret. Raises SettingsError.

    Small local files (the token, dataset.json, prompts) travel as text, because a pod cannot read this machine's disk.
    """
    variables: dict[str, str] = {}
    for name in NAMES:
        if environ.get(name, "").strip() and name not in LOCAL_PATHS:
            variables[name] = environ[name]
    for text in env:
        name, value = _pair(text, "--env")
        if name not in NAMES:
            raise SettingsError(f"--env {name}: no such variable. `python -m entrypoint --help-env` lists all.")
        variables[name] = value
    for text in secret:
        name, secret = _pair(text, "--secret")
        variables[name] = f"{{{{ {FROM_RUNPOD}{secret} }}}}"
    if token_file := variables.pop("HF_TOKEN_FILE", ""):
        try:
            variables["HF_TOKEN"] = Path(token_file).expanduser().read_text(encoding="utf-8").strip()
        except OSError as problem:
            raise SettingsError(f"HF_TOKEN_FILE={token_file}: {problem.strerror}.") from problem
    for name in ("DATASET_CONFIG", "SAMPLE_PROMPTS"):
        value = variables.get(name, "")
        if value.endswith(".json") and Path(value).is_file():
            variables[name] = json.dumps(_tree(name, Path(value).read_text(encoding="utf-8")))
    jobs = variables.get("JOBS", "")
    if jobs and not is_inline(jobs) and Path(jobs).expanduser().is_file():
        variables["JOBS"] = Path(jobs).expanduser().read_text(encoding="utf-8")
    for name in (*PATH_VARIABLES, "JOBS"):
        if name in variables and not is_inline(variables[name]):
            _refuse_local_path(name, variables[name])
    config = variables.get("DATASET_CONFIG", "")
    if config.startswith("{"):
        for key, value in _local_paths_in(_tree("DATASET_CONFIG", config)):
            _refuse_local_path(f"{key} of DATASET_CONFIG", value)
    return variables


def _tree(name: str, text: str) -> Any:
    """The value of a variable that holds JSON, or JSON5 as people write it. Raises SettingsError."""
    try:
        tree, _ = parse(text, "json")
    except ValueError as problem:
        raise SettingsError(f"{name}: {problem}. Fix: correct it at this place.") from problem
    return tree


def _refuse_local_path(name: str, value: str) -> None:
    """Raise SettingsError if `value` can only be a file or folder of this machine, which no pod sees."""
    if value.startswith((f"{VOLUME_PATH}/", "/opt/", "{", "[", "http://", "https://")) or value == VOLUME_PATH:
        return
    if re.match(PATH_OF_THIS_MACHINE, value) or checks.is_file(value) or checks.is_folder(value):
        raise SettingsError(
            f"{name}={value} is on this machine, where no pod can read it. Name a Hub repository, a URL, or a path on "
            f"the volume ({VOLUME_PATH}/...); docs/runpod.md says how images get there."
        )


def _local_paths_in(document: Any) -> list[tuple[str, str]]:
    """Keys and values of a dataset.json that name files or folders."""
    pairs: list[tuple[str, str]] = []
    if isinstance(document, list):
        for item in document:
            pairs += _local_paths_in(item)
    if isinstance(document, dict):
        for key, value in document.items():
            if key in PATH_KEYS and isinstance(value, str):
                pairs.append((key, value))
            pairs += _local_paths_in(value)
    return pairs


def card_summary(variables: Mapping[str, str], gpu: Mapping[str, Any], *, count: int) -> list[str]:
    """What the planner says about this job on this card, as lines for the user.

    Raises SettingsError for a job that cannot run there, such as a batch that its memory cannot hold. Nothing on the
    volume can be seen from here, so files there count as if they were not named.
    """
    try:
        hardware = cards.hardware_of(f"{count} x {gpu['id']}")
    except SettingsError:
        return [f"{gpu['name']} is not a known card, so its memory is not checked."]
    settings, manifest = plannable(variables)
    plan = make_plan(settings, manifest, hardware, now=datetime.datetime.now(datetime.UTC))
    return [*plan.warnings, *(line for line in plan.reasons if line.startswith(MEMORY_LINES))]


def plannable(variables: Mapping[str, str]) -> tuple[Settings, Manifest]:
    """The settings and documents of a job elsewhere, by which the planner can tell whether it fits on a card.

    Which images they are does not matter here.
    """
    visible = {name: value for name, value in variables.items() if FROM_RUNPOD not in value}
    for name in PATH_VARIABLES:
        if visible.get(name, "").startswith(VOLUME_PATH):
            del visible[name]
    config = visible.get("DATASET_CONFIG")
    if config is not None and config.startswith("{"):
        config = json.dumps(_without_sources(_tree("DATASET_CONFIG", config)))
    visible["DATASET_NAME"] = "any/images"
    settings = read_settings(visible)
    return settings, read_manifest(config, settings.output.sample_prompts)


def _without_sources(document: Any) -> Any:
    """A dataset.json whose subsets name no images of their own."""
    if isinstance(document, list):
        return [_without_sources(item) for item in document]
    if isinstance(document, dict):
        return {key: _without_sources(value) for key, value in document.items() if key not in SOURCE_KEYS}
    return document


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        shown = text if text in NAMES else "***"  # what stands in the place of a name may be a token
        raise SettingsError(f"{option} {shown} has no value: write {option} NAME=VALUE.")
    return name, value


def pack(variables: Mapping[str, str]) -> dict[str, str]:
    """At most as many variables as a pod may have: if there are more, all PARAMS_* go into CONFIG_JSON."""
    if len(variables) <= MAX_POD_VARIABLES:
        return dict(variables)
    packed = dict(_tree(CONFIG_JSON, variables.get(CONFIG_JSON, "{}")))
    packed.update({name: value for name, value in variables.items() if name.startswith("PARAMS_")})
    kept = {name: value for name, value in variables.items() if name not in packed}
    kept[CONFIG_JSON] = json.dumps(packed)
    return kept


def shown_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """A copy to print, without secrets; references to RunPod's secrets stay readable."""
    shown = secrets.shown(variables)
    # Somebody may have written the token itself in the place of the secret's name.
    references = {name: without_secrets(value) for name, value in variables.items() if REFERENCE.fullmatch(value)}
    return shown | references
