"""`python -m entrypoint.runpod COMMAND`: run jobs on RunPod, from your own machine.

`deploy` takes the job's variables from the environment, as a local start does, and checks them before it asks for a
pod, because a pod costs money from its first second. docs/runpod.md walks through all commands.

Each command is a function of the parsed options, the API client and the environment; it returns the exit code.
"""

from __future__ import annotations

from trainer.process import guard

if __name__ == "__main__":
    guard.begin()  # before everything else is imported: from here on a stop is a stop

import argparse
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrypoint.fetch import http
from entrypoint.runpod import download, request
from entrypoint.runpod.api import RunPod
from entrypoint.settings import Settings, read_settings
from entrypoint.settings.variables.engine import BACKENDS
from entrypoint.system import secrets
from trainer.process import streams
from trainer.spec.commands.ending import exit_code_of
from trainer.spec.commands.parser import Parser, whole
from trainer.spec.errors import KilnError, SettingsError, UnreachableError
from trainer.spec.family import base_models
from trainer.spec.log_lines import log_to, safe_lines
from trainer.spec.messages.secrets import without_secrets
from trainer.spec.values import as_number, show

logger = logging.getLogger(__name__)

DISK_GB = 25  # the container's own disk: the image and temporary files
VOLUME_GB = 100  # base models, cache, checkpoints and results: everything below request.VOLUME_PATH
ENDED_STATUSES = ("EXITED", "ERROR", "TERMINATED")
TEMPLATE_VARIABLES = {"DATASET_NAME": "", "TRIGGER_WORD": "", "HF_TOKEN": "{{ RUNPOD_SECRET_HF_TOKEN }}"}


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Run one command and return its exit code.

    Codes are those of `trainer.spec.errors`, 70 for a bug; 64 for a wrong command line; 1 if you decline the price.
    """
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return 64 if stop.code else 0
    given = dict(text.partition("=")[::2] for text in getattr(options, "env", ()))
    with secrets.hidden({**environ, **given}) as known:
        log_to(logging.StreamHandler(), "%(message)s", level=logging.WARNING, known=known)
        return _run(options, environ)


def _run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Run the command of `options`; print its errors and return its exit code."""
    commands = {
        "template": template,
        "deploy": deploy,
        "status": status,
        "logs": logs,
        "start": start_pod,
        "fetch": fetch,
        "stop": stop_pod,
        "gpus": gpus,
    }
    command = commands[options.command]

    def run() -> int:
        try:
            return command(options, RunPod.from_environment(environ), environ) or streams.output_code()
        except KilnError as problem:
            print(safe_lines(without_secrets(str(problem))), file=sys.stderr)  # noqa: T201
            return problem.exit_code

    return exit_code_of(run, logger)


def _parser() -> Parser:
    parser = Parser("python -m entrypoint.runpod", description="Jobs on RunPod; needs RUNPOD_API_KEY.")
    commands = parser.add_subparsers(dest="command", required=True)

    image_options = Parser(add_help=False)
    image_options.add_argument("--image", required=True, help="REGISTRY/NAME:TAG, as for ./build.sh --tag")
    image_options.add_argument(
        "--disk", type=whole(1), default=DISK_GB, help=f"GB for the container (default {DISK_GB})"
    )
    image_options.add_argument(
        "--volume",
        type=whole(1),
        default=VOLUME_GB,
        help=f"GB for {request.VOLUME_PATH}, kept while the pod is stopped (default {VOLUME_GB})",
    )
    cloud_options = Parser(add_help=False)
    cloud_options.add_argument("--cloud", choices=("secure", "community"), default="secure")
    cloud_options.add_argument("--count", type=whole(1), default=1, help="number of GPUs in the pod")

    accelerators = [backend for backend in BACKENDS if backend != "cpu"]
    make = commands.add_parser("template", parents=[image_options], help="create or update a template")
    make.add_argument("--backend", choices=accelerators, default="cuda")
    make.add_argument("--name", default="Kiln")

    start = commands.add_parser(
        "deploy",
        parents=[image_options, cloud_options],
        help="start a job in a new pod; shows the price and asks first",
    )
    start.add_argument("--gpu", required=True, help="part of a name that the gpus command prints")
    start.add_argument(
        "--network-volume", metavar="ID", help=f"mount this network volume at {request.VOLUME_PATH} instead"
    )
    start.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable, besides the environment's"
    )
    start.add_argument(
        "--secret", action="append", default=[], metavar="NAME=SECRET", help="set a variable from a RunPod secret"
    )
    start.add_argument("--max-cost", type=_price, metavar="USD", help="save and end the pod when it has cost this much")
    start.add_argument("--name", default="kiln")
    start.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    start.add_argument("--dry-run", action="store_true", help="print the request and its price; deploy nothing")

    show = commands.add_parser("status", help="list your pods, or show one and how to download its results")
    show.add_argument("pod", nargs="?", type=_pod_id)
    follow = commands.add_parser("logs", help="print a pod's log")
    follow.add_argument("pod", type=_pod_id)
    follow.add_argument("--tail", type=whole(0), default=100, help="number of past lines to print first (default 100)")
    follow.add_argument("--follow", action="store_true", help="continue until the pod ends")
    again = commands.add_parser("start", help="start a stopped pod: its job resumes, or its results can be downloaded")
    again.add_argument("pod", type=_pod_id)
    bring = commands.add_parser("fetch", help="download a pod's results; starts the pod if it is stopped")
    bring.add_argument("pod", type=_pod_id)
    bring.add_argument("--to", default="output", metavar="FOLDER", help="where to put them (default output)")
    end = commands.add_parser("stop", help="stop a pod; its volume is kept, and billed")
    end.add_argument("pod", type=_pod_id)
    end.add_argument("--terminate", action="store_true", help="delete the pod with its volume")
    list_gpus = commands.add_parser("gpus", parents=[cloud_options], help="list GPU types with their prices")
    prices_only = "print one JSON object of names and prices, for python -m entrypoint quote --prices"
    list_gpus.add_argument("--json", action="store_true", help=prices_only)
    return parser


# ---- commands


def template(options: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    """Create or update the template of one backend."""
    body = {
        "name": f"{options.name} ({options.backend})",
        "image": request.with_backend(options.image, options.backend),
        "args": "train",
        "category": BACKENDS[options.backend].upper(),
        "disk": options.disk,
        "env": {"BASE_MODEL": next(iter(base_models())), **TEMPLATE_VARIABLES},
        "ports": request.ports(TEMPLATE_VARIABLES),
        "mounts": {"persistent": {"size": options.volume, "path": request.VOLUME_PATH}},
        "startSsh": True,
        "startJupyter": False,
    }
    saved, is_new = api.put_template(body)
    verb = "Created" if is_new else "Updated"
    _print(f"{verb} the template {saved['name']} ({saved['id']}) with {saved['image']}.")
    return 0


def deploy(options: argparse.Namespace, api: RunPod, environ: Mapping[str, str]) -> int:
    """Check the job's settings, show the price, ask, and create the pod."""
    gpu = _choose_gpu(options.gpu, api.gpus(cloud=options.cloud.upper(), count=options.count))
    price_per_hour = gpu["price"][options.cloud] * options.count
    if not gpu[options.cloud] or not price_per_hour:
        raise SettingsError(
            f"--cloud {options.cloud} has no {gpu['name']}: `python -m entrypoint.runpod gpus` lists those it has."
        )
    variables = request.job_variables(environ, env=options.env, secret=options.secret)
    variables["PRICE_PER_HOUR"] = f"{price_per_hour:.4g}"
    if options.max_cost is not None:
        variables["MAX_COST"] = f"{options.max_cost:g}"
    # A secret's value is known only inside the pod, so its variable cannot be checked here.
    settings = read_settings({name: value for name, value in variables.items() if request.FROM_RUNPOD not in value})
    body = request.pod_request(options, gpu, request.pack(variables))

    planned = request.card_summary(variables, gpu, count=options.count)

    stock = str(gpu.get("availability", "unknown")).lower()
    _print(
        f"{options.count} x {gpu['name']} ({gpu['memory']} GB each), {options.cloud} cloud: "
        f"${price_per_hour:.2f} an hour."
    )
    _print(f"Stock: {stock}. Image: {body['image']}.")
    for line in planned:
        _print(line)
    if _needs_token(settings) and "HF_TOKEN" not in variables:
        base_model = settings.model.base_model
        _print(
            f"BASE_MODEL={base_model} needs an accepted licence and HF_TOKEN is not set: add --secret HF_TOKEN=NAME."
        )
    if options.max_cost is not None:
        hours = options.max_cost / price_per_hour
        _print(f"The job ends when it has cost ${options.max_cost:.2f}, after {hours:.1f} hours.")
    else:
        _print("No --max-cost is set: the pod runs, and costs, until the job ends.")
    if options.dry_run:
        _print(json.dumps({**body, "env": request.shown_variables(body["env"])}, indent=2), whole_lines=True)
        return 0
    if not options.yes and not _confirmed():
        _print("Nothing was deployed.")
        return 1
    pod = api.create_pod(body)
    _print(
        f"Pod {pod['id']} ({pod['name']}) is {pod['status'].lower()}, ${pod['cost']:.2f} an hour. "
        "It stops itself when the job ends."
    )
    _print(f"python -m entrypoint.runpod logs {pod['id']} --follow")
    return 0


def status(options: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    """List all pods, or show one with the command that downloads its results in its present state."""
    if options.pod is None:
        for pod in api.pods():
            gpu = pod.get("gpu") or {"id": "CPU", "count": 1}
            _print(
                f"{pod['id']}  {pod['status']:<12} ${pod['cost']:.2f}/h  {gpu['count']} x {gpu['id']}  {pod['name']}"
            )
        return 0
    pod = api.pod(options.pod)
    _print(f"{pod['name']}: {pod['status']}, ${pod['cost']:.2f} an hour, {pod['image']}.")
    folder = output_path(pod)
    host = download.ssh_host(pod)
    if host or pod["status"] == "EXITED":
        _print(f"To download the results: python -m entrypoint.runpod fetch {options.pod}")
    if host:
        _print(f"That is: {shlex.join(download.commands(host, folder, Path('output'))[0])}")
    elif pod["status"] == "EXITED":
        _print(f"It starts the pod again, which then stays up for half an hour with {folder}.")
    else:
        _print(f"In the pod's web terminal: runpodctl send {folder}; then here: runpodctl receive CODE")
    return 0


def logs(options: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    """Print a pod's log. RunPod closes the stream now and then; with --follow, it is opened again where it ended."""
    cursor: str | None = None
    while True:
        try:
            for event_id, line in api.log_lines(options.pod, tail=options.tail, cursor=cursor):
                cursor = event_id or cursor
                _print(line)
        except http.TransientError as problem:
            if not options.follow:
                raise UnreachableError(f"RunPod did not send the log: {problem}.") from problem
            logger.warning("%s: asking for the log again.", problem)
        except KeyboardInterrupt:
            return 130
        if not options.follow or api.pod(options.pod)["status"] in ENDED_STATUSES:
            return 0
        time.sleep(api.retries.first_wait)


def start_pod(options: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    """Start a stopped pod. An unfinished job resumes; a finished one leaves half an hour for downloading."""
    api.act(options.pod, "start")
    _print(f"{options.pod}: RunPod accepted start. It costs ${api.pod(options.pod)['cost']:.2f} an hour again.")
    _print(f"python -m entrypoint.runpod logs {options.pod} --follow")
    return 0


def fetch(options: argparse.Namespace, api: RunPod, environ: Mapping[str, str]) -> int:
    """Download the output of a pod to a folder here."""
    pod = api.pod(options.pod)
    was_stopped = pod["status"] == "EXITED"
    if was_stopped:
        api.act(options.pod, "start")
        _print(f"{options.pod} is starting; it costs money until it stops again.")
    host = download.wait_for_ssh(api, options.pod)
    code = download.copy(host, output_path(pod), Path(options.to), environ=environ)
    if was_stopped:
        _print(f"Stop it again: python -m entrypoint.runpod stop {options.pod}")
    return code


def output_path(pod: Mapping[str, Any]) -> str:
    """The folder of a pod's results, inside the pod."""
    return str(pod["env"].get("OUTPUT_PATH", f"{request.VOLUME_PATH}/output"))


def stop_pod(options: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    action = "terminate" if options.terminate else "stop"
    api.act(options.pod, action)
    _print(f"{options.pod}: RunPod accepted {action}.")
    return 0


def gpus(options: argparse.Namespace, api: RunPod, _: Mapping[str, str]) -> int:
    """List the GPU types of a cloud, cheapest first, with price and memory of `--count` of them."""
    types = api.gpus(cloud=options.cloud.upper(), count=options.count)
    if options.json:  # with the memory, which tells apart cards that share a name
        offered = [gpu for gpu in types if gpu[options.cloud]]
        _print(
            json.dumps({f"{gpu['name']} {gpu['memory']}GB": gpu["price"][options.cloud] for gpu in offered}, indent=2)
        )
        return 0
    for gpu in sorted(types, key=lambda gpu: gpu["price"][options.cloud]):
        if not gpu[options.cloud]:
            continue
        price = gpu["price"][options.cloud] * options.count
        memory_gb = gpu["memory"] * options.count
        stock = str(gpu.get("availability", "unknown")).lower()
        _print(f"${price:6.2f}/h  {memory_gb:4d} GB  stock {stock:<8} {gpu['name']}  ({gpu['id']})")
    return 0


# ---- parts of a command


def _choose_gpu(wanted: str, types: list[dict[str, Any]]) -> dict[str, Any]:
    """The one GPU type that `wanted` names, in whole or in part. Raises SettingsError for none, or several."""
    wanted_lower = wanted.lower()
    matches = [gpu for gpu in types if wanted_lower in (gpu["id"].lower(), gpu["name"].lower())]
    if not matches:
        matches = [gpu for gpu in types if wanted_lower in f"{gpu['id']} {gpu['name']}".lower()]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(sorted(gpu["name"] for gpu in matches or types))
    if matches:
        raise SettingsError(f"--gpu {wanted} matches several types: name one of {names}.")
    raise SettingsError(f"--gpu {wanted} matches no type: name one of {names}.")


def _needs_token(settings: Settings) -> bool:
    """Whether the Hub gives the base model's weights only to accounts that have accepted its licence."""
    known = base_models().get(settings.model.base_model)
    return known is not None and known[1].gated and settings.model.model_path is None


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise SettingsError("No terminal to confirm the price in: add --yes to deploy at this price.")
    try:
        answer = input("Deploy? [y/N] ")
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def _price(text: str) -> float:
    """The type of an argument that is an amount of money."""
    amount = as_number(text.strip())
    if amount is None or amount <= 0:
        raise argparse.ArgumentTypeError(f"{show(text)} is not a number above 0")
    return amount


def _pod_id(text: str) -> str:
    """The type of an argument that names a pod."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", text):
        raise argparse.ArgumentTypeError(f"{show(text)} is not the id of a pod: `status` lists yours")
    return text


def _print(text: str, *, whole_lines: bool = False) -> None:
    print(text if whole_lines else safe_lines(text), flush=True)  # noqa: T201


if __name__ == "__main__":
    streams.protect()
    sys.exit(main(sys.argv[1:], os.environ))
