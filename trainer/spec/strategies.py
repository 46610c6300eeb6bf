"""The ways to save memory: what is recomputed and what is offloaded. The planner and the engine read the same table."""

from __future__ import annotations

# How much the backward pass recomputes, from the least memory to the most (`trainer.engine.memory.checkpointing`).
POLICIES = ("all", "attention", "products", "none")


def fallbacks(policy: str, kept: int, offload: str, *, compiled: bool) -> list[tuple[str, int, str]]:
    """This way to run and those below it, each with less memory: (policy, blocks that keep all, offload)."""
    # Without the compiler, what a policy keeps is held by the checkpoint itself, and does not go to the host.
    # It takes less of the device than all that is recomputed there, which is tried if the host has no such memory.
    waiting = [("attention", "activations")] if compiled else []
    ladder = [
        ("products", "none"),
        ("attention", "none"),
        *waiting,
        ("all", "none"),
        ("all", "activations"),
        ("all", "weights"),
    ]
    less, further = POLICIES, tuple(OFFLOADS)
    below = [
        (p, 0, o)
        for p, o in ladder
        if less.index(p) <= less.index(policy) and further.index(o) >= further.index(offload)
        if (p, 0, o) != (policy, kept, offload)
    ]
    return [(policy, kept, offload), *below]


OFFLOADS = {  # what waits in the host's memory, in words for the log
    "none": "",
    "activations": ", kept on the host",
    "weights": ", kept on the host as the weights are",
}
RESIDENT = (
    ("none", "none"),
    ("products", "none"),
    ("attention", "none"),
    ("attention", "activations"),
    ("all", "none"),
    ("all", "activations"),
)


def described(recompute: str, kept_blocks: int, offload: str) -> str:
    """A way in words, for the log."""
    what = {
        "none": "everything kept",
        "products": "all but products recomputed",
        "attention": "all but attention recomputed",
        "all": "all recomputed",
    }[recompute]
    kept = f", {kept_blocks} blocks kept whole" if kept_blocks else ""
    return f"{what}{kept}{OFFLOADS[offload]}"
