"""`python -m entrypoint.runpod template|deploy|status|logs|stop|gpus`: jobs on RunPod, from your own machine.

deploy takes the job's variables from the environment, as a local start does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrypoint.fetch import http
from entrypoint.runpod.api import RunPod
from entrypoint.settings import Settings, read_settings
from entrypoint.settings.variables import CONFIG_JSON, NAMES, SECRETS
from entrypoint.settings.variables.engine import BACKENDS
from trainer.spec.errors import KilnError, SettingsError
from trainer.spec.family import base_models

VOLUME = "/workspace"
DISK_GB, VOLUME_GB = 25, 100
PORTS = ["22/tcp"]  # SSH, for fetching the results
MOST_VARIABLES = 50  # of a pod
CUDA = "13.0"  # that torch in the image is built for: the host's driver must know it
ENDED = ("EXITED", "ERROR", "TERMINATED")
PLACES = ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME")  # the image has good ones, and yours are of another machine
TEMPLATE = {"DATASET_NAME": "", "TRIGGER_WORD": "", "HF_TOKEN": "{{ RUNPOD_SECRET_HF_TOKEN }}"}


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Exit codes as in `trainer.spec.errors`; 64 for a wrong command line; 1 if you say no."""
    parser = _parser()
    try:
        asked = parser.parse_args(arguments)
    except SystemExit as stop:
        return 64 if stop.code else 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    commands = {
        "template": template, "deploy": deploy, "status": status, "logs": logs, "stop": stop_pod, "gpus": gpus
    }  # fmt: skip
    try:
        return commands[asked.command](asked, RunPod.of(environ), environ)
    except KilnError as problem:
        print(problem, file=sys.stderr)  # noqa: T201
        return problem.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m entrypoint.runpod", description="Jobs on RunPod; needs RUNPOD_API_KEY.")
    commands = parser.add_subparsers(dest="command", required=True)
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("--image", required=True, help="as ./build.sh --tag calls it, REGISTRY/NAME:TAG")
    images.add_argument("--disk", type=int, default=DISK_GB, help=f"GB of the container ({DISK_GB})")
    images.add_argument("--volume", type=int, default=VOLUME_GB, help=f"GB of {VOLUME}, kept while stopped (100)")
    clouds = argparse.ArgumentParser(add_help=False)
    clouds.add_argument("--cloud", choices=("secure", "community"), default="secure")
    clouds.add_argument("--count", type=int, default=1, help="GPUs of the pod")

    make = commands.add_parser("template", parents=[images], help="make or update a template")
    make.add_argument("--backend", choices=[b for b in BACKENDS if b != "cpu"], default="cuda")
    make.add_argument("--name", default="Kiln")
    new = commands.add_parser("deploy", parents=[images, clouds], help="start a job in a new pod; asks before it pays")
    new.add_argument("--gpu", required=True, help="part of a name that gpus prints")
    new.add_argument("--network-volume", metavar="ID", help=f"of RunPod, for {VOLUME}, instead of a volume of the pod")
    new.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="beside those of the environment")
    new.add_argument("--secret", action="append", default=[], metavar="NAME=SECRET", help="a variable from a secret")
    new.add_argument("--max-cost", type=float, metavar="USD", help="the job saves, and the pod ends, at this cost")
    new.add_argument("--name", default="kiln")
    new.add_argument("--yes", action="store_true", help="do not ask")
    new.add_argument("--dry-run", action="store_true", help="print what would be asked for, and its price")
    about = commands.add_parser("status", help="your pods, or one of them and how to fetch its results")
    about.add_argument("pod", nargs="?")
    tell = commands.add_parser("logs", help="what a pod prints")
    tell.add_argument("pod")
    tell.add_argument("--tail", type=int, default=100, help="lines of before (100)")
    tell.add_argument("--follow", action="store_true", help="until the pod ends")
    end = commands.add_parser("stop", help="stop a pod; its volume is kept, and costs")
    end.add_argument("pod")
    end.add_argument("--terminate", action="store_true", help="delete it with its volume")
    commands.add_parser("gpus", parents=[clouds], help="GPU types with their prices")
    return parser


# ---- commands


def template(asked: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    vendor = BACKENDS[asked.backend].upper()
    body = {
        "name": f"{asked.name} ({asked.backend})",
        "image": _image(asked.image, asked.backend),
        "args": "train",
        "category": vendor,
        "disk": asked.disk,
        "env": {"BASE_MODEL": next(iter(base_models())), **TEMPLATE},
        "ports": PORTS,
        "mounts": {"persistent": {"size": asked.volume, "path": VOLUME}},
        "startSsh": True,
        "startJupyter": False,
    }
    found, made = api.put_template(body)
    _say(f"{'Made' if made else 'Updated'} the template {found['name']} ({found['id']}) with {found['image']}.")
    return 0


def deploy(asked: argparse.Namespace, api: RunPod, environ: Mapping[str, str]) -> int:
    gpu = _gpu(asked.gpu, api.gpus(cloud=asked.cloud.upper(), count=asked.count))
    price = gpu["price"][asked.cloud] * asked.count
    if not gpu[asked.cloud] or not price:
        raise SettingsError(f"--cloud {asked.cloud} has no {gpu['name']}: python -m entrypoint.runpod gpus lists all.")
    variables = _variables(asked, environ)
    variables["PRICE_PER_HOUR"] = f"{price:.4g}"
    if asked.max_cost is not None:
        variables["MAX_COST"] = f"{asked.max_cost:g}"
    settings = read_settings({k: v for k, v in variables.items() if "RUNPOD_SECRET_" not in v})
    body = _pod(asked, gpu, _fewer(variables))

    _say(f"{asked.count} x {gpu['name']} ({gpu['memory']} GB each), {asked.cloud} cloud: ${price:.2f} an hour.")
    _say(f"Stock: {str(gpu.get('availability', 'unknown')).lower()}. Image: {body['image']}.")
    if _needs_token(settings) and "HF_TOKEN" not in variables:
        base = settings.model.base_model
        _say(f"BASE_MODEL={base} has a licence to accept, and no HF_TOKEN goes with the job: --secret.")
    if asked.max_cost is not None:
        _say(f"The job ends at ${asked.max_cost:.2f}, after {asked.max_cost / price:.1f} hours.")
    else:
        _say("Without --max-cost it runs, and costs, until the job is done.")
    if asked.dry_run:
        secret = [n for n in SECRETS if "RUNPOD_SECRET_" not in body["env"].get(n, "RUNPOD_SECRET_")]
        _say(json.dumps({**body, "env": {**body["env"], **dict.fromkeys(secret, "***")}}, indent=2))
        return 0
    if not asked.yes and not _agreed():
        _say("Nothing was deployed.")
        return 1
    pod = api.create_pod(body)
    _say(f"Pod {pod['id']} ({pod['name']}) is {pod['status'].lower()}, ${pod['cost']:.2f} an hour. It stops by itself.")
    _say(f"python -m entrypoint.runpod logs {pod['id']} --follow")
    return 0


def status(asked: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    if asked.pod is None:
        for pod in api.pods():
            gpu = pod.get("gpu") or {"id": "CPU", "count": 1}
            _say(f"{pod['id']}  {pod['status']:<12} ${pod['cost']:.2f}/h  {gpu['count']} x {gpu['id']}  {pod['name']}")
        return 0
    pod = api.pod(asked.pod)
    _say(f"{pod['name']}: {pod['status']}, ${pod['cost']:.2f} an hour, {pod['image']}.")
    out = pod["env"].get("OUTPUT_PATH", f"{VOLUME}/output")
    direct = (pod.get("ssh") or {}).get("direct")
    if direct:
        way = f"ssh -p {direct['port']}"
        _say(f"rsync -av -e '{way}' {direct['username']}@{direct['host']}:{out}/ ./output/")
    elif pod["status"] == "EXITED":
        _say(
            f"To fetch the results, start it again at https://console.runpod.io/pods: it stays half an hour for {out}."
        )
    else:
        _say(f"In the pod's web terminal: runpodctl send {out}; then here: runpodctl receive CODE")
    return 0


def logs(asked: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    cursor: str | None = None
    while True:
        try:
            for event, line in api.log_lines(asked.pod, tail=asked.tail, cursor=cursor):
                cursor = event or cursor
                _say(line)
        except http.TransientError as problem:
            logging.warning("%s: the log is asked for again.", problem)
        except KeyboardInterrupt:
            return 130
        if not asked.follow or api.pod(asked.pod)["status"] in ENDED:
            return 0
        time.sleep(api.retries.first_wait)


def stop_pod(asked: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    action = "terminate" if asked.terminate else "stop"
    api.act(asked.pod, action)
    _say(f"{asked.pod}: {action} was accepted.")
    return 0


def gpus(asked: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    for gpu in sorted(api.gpus(cloud=asked.cloud.upper(), count=asked.count), key=lambda g: g["price"][asked.cloud]):
        if gpu[asked.cloud]:
            price, stock = gpu["price"][asked.cloud] * asked.count, str(gpu.get("availability", "unknown")).lower()
            _say(f"${price:6.2f}/h  {gpu['memory'] * asked.count:4d} GB  stock {stock:<8} {gpu['name']}  ({gpu['id']})")
    return 0


# ---- parts of a request


def _pod(asked: argparse.Namespace, gpu: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """The body of POST /v2/pods."""
    backend = next((b for b, vendor in BACKENDS.items() if vendor.upper() == gpu["manufacturer"]), "cuda")
    wanted: dict[str, Any] = {"id": gpu["id"], "count": asked.count}
    if backend == "cuda":
        wanted["minCudaVersion"] = CUDA
    mounts: dict[str, Any] = {"persistent": {"size": asked.volume, "path": VOLUME}}
    if asked.network_volume:
        mounts = {"network": [{"volumeId": asked.network_volume, "path": VOLUME}]}
    return {
        "name": f"{asked.name}-{uuid.uuid4().hex[:8]}",
        "image": _image(asked.image, backend),
        "args": "train",
        "cloud": asked.cloud.upper(),
        "disk": asked.disk,
        "env": dict(variables),
        "gpu": wanted,
        "mounts": mounts,
        "ports": PORTS,
        "startSsh": True,
    }


def _image(name: str, backend: str) -> str:
    """`name` with the ending of ./build.sh, where it has none."""
    return name if "@" in name or name.endswith(tuple(f"-{b}" for b in BACKENDS)) else f"{name}-{backend}"


def _gpu(asked: str, known: list[dict[str, Any]]) -> dict[str, Any]:
    exact = [g for g in known if asked.lower() in (g["id"].lower(), g["name"].lower())]
    found = exact or [g for g in known if asked.lower() in f"{g['id']} {g['name']}".lower()]
    if len(found) != 1:
        names = ", ".join(sorted(g["name"] for g in found or known))
        raise SettingsError(f"--gpu {asked}: {'which of' if found else 'there is none; known are'} {names}.")
    return found[0]


def _variables(asked: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, str]:
    """The job's variables: those of the environment, then --env, then --secret. Raises SettingsError."""
    found = {n: environ[n] for n in NAMES if environ.get(n, "").strip() and n not in PLACES}
    for name, value in (_pair(text, "--env") for text in asked.env):
        if name not in NAMES:
            raise SettingsError(f"--env {name}: no such variable. python -m entrypoint --help-env lists all.")
        found[name] = value
    for name, secret in (_pair(text, "--secret") for text in asked.secret):
        found[name] = f"{{{{ RUNPOD_SECRET_{secret} }}}}"
    if file := found.pop("HF_TOKEN_FILE", ""):
        try:
            found["HF_TOKEN"] = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except OSError as problem:
            raise SettingsError(f"HF_TOKEN_FILE={file}: {problem.strerror}.") from problem
    for name in ("DATASET_CONFIG", "SAMPLE_PROMPTS"):
        if found.get(name, "").endswith(".json") and Path(found[name]).is_file():
            found[name] = json.dumps(json.loads(Path(found[name]).read_text(encoding="utf-8")))
    for name, value in found.items():
        if not value.startswith((VOLUME, "/opt", "{", "[", "http")) and Path(value).expanduser().exists():
            raise SettingsError(
                f"{name}={value} is on this machine, where no pod can read it. Name a Hub repository, an address, or a "
                f"place on the volume ({VOLUME}/...)."
            )
    return found


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError(f"{option} {text}: NAME=VALUE is needed.")
    return name, value


def _fewer(variables: Mapping[str, str]) -> dict[str, str]:
    """At most as many variables as a pod may have: the rest go into CONFIG_JSON."""
    if len(variables) <= MOST_VARIABLES:
        return dict(variables)
    packed = {n: v for n, v in variables.items() if n.startswith("PARAMS_")}
    packed = {**json.loads(variables.get(CONFIG_JSON, "{}")), **packed}
    return {n: v for n, v in variables.items() if n not in packed} | {CONFIG_JSON: json.dumps(packed)}


def _needs_token(settings: Settings) -> bool:
    """Whether the weights are given only to those who have accepted a licence."""
    known = base_models().get(settings.model.base_model)
    return known is not None and known[1].gated and settings.model.model_path is None


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise SettingsError("Nobody can be asked here: say --yes to deploy at this price.")
    return input("Deploy? [y/N] ").strip().lower() in ("y", "yes")


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
