"""Weights & Biases. Without WANDB_API_KEY the run stays in the run's folder, and `wandb sync` sends it later."""

from __future__ import annotations

import html
import os

from entrypoint.report.gather import Sample
from entrypoint.trackers.feed import About


class Run:
    """A run of wandb. It reads WANDB_PROJECT, WANDB_ENTITY and the rest itself."""

    def __init__(self, about: About) -> None:
        import wandb

        self._wandb = wandb
        has_key = bool(os.environ.get("WANDB_API_KEY"))
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "kiln",
            name=about.name,
            id=about.id,
            resume="allow",
            dir=str(about.place),
            mode=mode,
            config=about.config,
            # Nothing of the machine, the terminal or the code goes there.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
        self.where = self._run.url or f"{about.place}/wandb (offline: `wandb sync` sends it)"
        # Samples of a step come after the numbers of later ones: wandb's own count of steps would drop them.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if not about.resumed:
            self._run.log({"plan": wandb.Html(f"<pre>{html.escape(about.plan)}</pre>"), "step": 0})

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def images(self, step: int, samples: list[Sample]) -> None:
        shown = {f"sample/{s.number:02d}": self._wandb.Image(str(s.path), caption=s.prompt) for s in samples}
        self._run.log({**shown, "step": step})

    def finish(self, *, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
