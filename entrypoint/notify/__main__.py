"""`python -m entrypoint.notify`: reads what to tell whom from its standard input, and the end of the job from it later.

The first line is a `beside.Job` as JSON. A second line, also JSON, says how the job has ended and how long this process
may take to say so. The end of the input without it: the entrypoint is gone, and so is this process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from entrypoint.fetch import public_addresses
from entrypoint.notify.beside import Job
from entrypoint.notify.delivery import NAME, Pace, Queue, Teller, digest_of
from entrypoint.notify.events import Watch
from entrypoint.notify.messages import wants
from entrypoint.system import secrets
from trainer.spec.log_lines import log_to
from trainer.spec.messages.secrets import Known, without_secrets

POLL_S = 1.0


def main() -> int:
    """Tell until the job has ended; returns 0."""
    public_addresses.guard(os.environ)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # the entrypoint decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    job = Job(**json.loads(sys.stdin.readline()))
    with secrets.hidden({"WEBHOOK_URL": " ".join(job.addresses), "WEBHOOK_SECRET": job.secret}) as known:
        log_to(logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s", known=known)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs addresses
        tell(job, known)
    return 0


def tell(job: Job, known: Known) -> None:
    """Watch the folder and tell the addresses, until standard input says that the job has ended and all is told."""
    ended: list[dict[str, Any]] = []
    ending = threading.Event()

    def listen() -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(143)
        ended.append(json.loads(line))
        ending.set()

    pace = Pace(**job.pace)
    queue = Queue.opened(Path(job.out) / NAME, set(map(digest_of, job.addresses)), time.time())
    tellers = [Teller(url, queue, secret=job.secret, pace=pace, ending=ending) for url in job.addresses]
    watch = Watch(Path(job.out), base=job.base, started=job.started, price=job.price, told=queue.told)
    threading.Thread(target=listen, daemon=True).start()
    for teller in tellers:
        teller.start()
    while True:
        is_last = ending.wait(POLL_S)
        found = watch.look(time.time())
        if is_last:
            how = ended[0]
            message = without_secrets(known.hide(str(how["message"])))
            found.append(watch.ending(time.time(), exit_code=int(how["exit_code"]), message=message))
        for event in found:
            queue.add(event, {teller.digest for teller in tellers if wants(teller.kind, event)})
        if is_last:
            break
    deadline = time.monotonic() + float(ended[0]["seconds"])
    while not queue.is_empty() and time.monotonic() < deadline:
        with queue.changed:
            queue.changed.wait(min(0.5, max(0.0, deadline - time.monotonic())))
    if not queue.is_empty():
        logging.getLogger("entrypoint.notify").warning(
            "WEBHOOK_URL: not everything is told. The next start in this folder tells it, for a day."
        )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads wait for answers, and the one that reads for its line
