"""`python -m entrypoint.runpod.serverless`: become the job of one request, of which `runpod/handler.py` starts it.

Its standard input is a JSON object: `input` of the request, `output` (the folder of results) and `folder` (an empty
one, which is deleted when the job has ended). The request is checked against `entrypoint.runpod.allowed`. Then this
process becomes `python -m entrypoint` with an environment that has been made for it: the request's variables, places
in `folder`, and of the worker only what its operator has meant for jobs. So nothing of the worker's secrets is left
in the job, not even in /proc/self/environ.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from entrypoint.runpod.allowed import REFUSED, TOKENS, variables_of
from entrypoint.settings.variables import ALIASES, CONFIG_JSON, NAMES, SECRETS
from entrypoint.system import environment, public_addresses, secrets
from trainer.spec.errors import KilnError
from trainer.spec.log_lines import log_to

log = logging.getLogger("entrypoint.runpod.serverless")

# The operator's: whether requests without a token of their own may download with the worker's.
LENDS_TOKEN = "KILN_REQUESTS_USE_HF_TOKEN"  # noqa: S105 (the name of a variable)
WORKER_TOKENS = ("HF_TOKEN", *ALIASES)
# Of the worker's own variables, these are no defaults for requests: what a request may not say, tokens, and where
# results go.
NOT_DEFAULTS = (*REFUSED, "PUSH_TO_HUB", "UPLOAD_TO", CONFIG_JSON, *SECRETS)
# The worker's libraries would keep files in places that these name, where the next request finds them.
OWN_PLACES = ("HOME", "TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME")
HUB = ("HF_ENDPOINT", "HF_HUB_OFFLINE")  # of all that begins with HF_


def main(environ: Mapping[str, str]) -> int:
    """Returns only if the request is refused: the exit code. Otherwise the job has taken the place of this process."""
    asked: dict[str, Any] = json.loads(sys.stdin.read())
    public_addresses.guard({**environ, public_addresses.VARIABLE: "1"})  # a document may be at an address
    try:
        request = variables_of(asked["input"])
    except KilnError as problem:
        log.error("%s", problem)
        log.error("%s [exit %d]", problem.advice, problem.exit_code)
        return problem.exit_code
    folder = Path(asked["folder"])
    return _become_job(job_environment(request, environ, folder=folder, output=asked["output"]), folder)


def _become_job(own: Mapping[str, str], folder: Path) -> NoReturn:
    """Run `python -m entrypoint` in this process, with the environment `own`."""
    for name in ("here", "home", "tmp"):
        (folder / name).mkdir()
    os.chdir(folder / "here")  # empty: a relative path leads to nothing
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", "entrypoint"], own)  # noqa: S606 (our own program)


def job_environment(
    request: Mapping[str, str], worker: Mapping[str, str], *, folder: Path, output: str
) -> dict[str, str]:
    """The environment of a job: what it needs of the worker, the operator's defaults, and the request's variables."""
    own = environment.child_environment(worker, network=True)
    for name in list(own):
        if name in OWN_PLACES or name in environment.NETWORK or name.startswith(("HF_", "KILN_")):
            del own[name]
    defaults = {name: value for name, value in worker.items() if name in NAMES and name not in NOT_DEFAULTS}
    hub = {name: worker[name] for name in HUB if name in worker}
    places = {
        "OUTPUT_PATH": output,
        "CACHE_PATH": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
    }
    # The client's other protocol connects without Python's sockets, where no address could be checked.
    limits = {public_addresses.VARIABLE: "1", "HF_HUB_DISABLE_XET": "1", "ON_FINISH": "exit", "MONITOR_PORT": "0"}
    return {**own, **defaults, **hub, **request, **places, **limits, **tokens(request, worker)}


def tokens(request: Mapping[str, str], worker: Mapping[str, str]) -> dict[str, str]:
    """The tokens of a job: the request's own. Where the operator lends it, and nothing is uploaded, the worker's."""
    own = {name: request[name] for name in TOKENS if request.get(name)}
    if own or request.get("PUSH_TO_HUB") or worker.get(LENDS_TOKEN, "").strip().lower() != "true":
        return own
    return {name: worker[name] for name in WORKER_TOKENS if worker.get(name)}


if __name__ == "__main__":
    worker = environment.take(os.environ)
    # Without proxies: behind one, the address that is connected to would be the proxy's.
    with secrets.hidden(worker) as known, environment.offline(os.environ):
        log_to(logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s", known=known)
        code = main(worker)
    sys.exit(code)
