"""`python -m entrypoint.notify`: the process that tells of a job. Its first line is a `beside.Job` as JSON.

What else it reads from its standard input, and when it ends: `entrypoint.processes.side_process`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from entrypoint.notify.beside import Job
from entrypoint.notify.delivery import NAME, Pace, Queue, Teller, digest_of
from entrypoint.notify.events import Watch
from entrypoint.notify.messages import wants
from entrypoint.processes.side_process import Instructions, leave_stops_to_the_job
from entrypoint.system import public_addresses, secrets
from trainer.spec.log_lines import log_to
from trainer.spec.messages.secrets import Known, without_secrets

POLL_S = 1.0


def main() -> int:
    """Tell until the job has ended; returns 0."""
    public_addresses.guard(os.environ)
    leave_stops_to_the_job()
    instructions = Instructions()
    job = Job(**instructions.first)
    with secrets.hidden({"WEBHOOK_URL": " ".join(job.addresses), "WEBHOOK_SECRET": job.secret}) as known:
        log_to(logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s", known=known)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs addresses
        tell(job, instructions, known)
    return 0


def tell(job: Job, instructions: Instructions, known: Known) -> None:
    """Watch the folder and tell the addresses, until the job has ended and all is told."""
    pace = Pace(**job.pace)
    queue = Queue.opened(Path(job.out) / NAME, set(map(digest_of, job.addresses)), time.time())
    ended = instructions.ended
    tellers = [Teller(url, queue, secret=job.secret, pace=pace, ending=ended) for url in job.addresses]
    watch = Watch(Path(job.out), base=job.base, started=job.started, price=job.price, told=queue.told)
    for teller in tellers:
        teller.start()
    while True:
        is_last = ended.wait(POLL_S)
        found = watch.look(time.time())
        if is_last:
            message = without_secrets(known.hide(instructions.message))
            found.append(watch.ending(time.time(), exit_code=instructions.exit_code, message=message))
        for event in found:
            queue.add(event, {teller.digest for teller in tellers if wants(teller.kind, event)})
        if is_last:
            break
    deadline = time.monotonic() + instructions.seconds
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
