"""Where a container runs besides RunPod, and what ON_FINISH can do there: said at the end, since it may cost money."""

from __future__ import annotations

from collections.abc import Mapping

ENDS_BY_ITSELF = "Hugging Face Jobs"


def place(environ: Mapping[str, str]) -> str:
    """The service that runs this container, as its own variables tell; "" for none that is known."""
    if environ.get("VAST_CONTAINERLABEL") or environ.get("CONTAINER_API_KEY"):
        return "Vast.ai"
    if environ.get("JOB_ID") and environ.get("ACCELERATOR"):
        return ENDS_BY_ITSELF
    return ""


def what_follows(action: str, environ: Mapping[str, str]) -> str | None:
    """What the end of the container means where it runs; None where nothing is to be said of it.

    `action`: what ON_FINISH asks for. Only RunPod's pods are stopped through an API; each other place gets the words.
    """
    service = place(environ)
    if service == ENDS_BY_ITSELF:
        if action in ("idle", "wait"):
            return f"{service} bills until the container exits, or its timeout is reached."
        return f"{service} ends the job, and its bill, when this container exits now."
    if service:
        number = environ.get("CONTAINER_ID", "") or environ.get("VAST_CONTAINERLABEL", "").removeprefix("C.")
        number = number if number.isdecimal() else "ID"
        verb = "destroy" if action == "terminate" else "stop"
        text = f"{service.upper()} BILLS THIS INSTANCE UNTIL IT IS STOPPED, which ON_FINISH={action} cannot do there:"
        return f"{text} vastai {verb} instance {number} does, or its console."
    if action in ("stop", "terminate"):
        text = (
            f"ON_FINISH={action} works on a pod of RunPod only. This container exits; whether that ends a bill depends"
        )
        return f"{text} on where it runs."
    return None
