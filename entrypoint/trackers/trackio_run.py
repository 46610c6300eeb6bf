"""Trackio: a Space of the Hub where TRACKIO_SPACE_ID names one; otherwise files in the run's folder."""

from __future__ import annotations

import os

from entrypoint.report.gather import Sample
from entrypoint.trackers.feed import About


class Run:
    """A run of trackio."""

    def __init__(self, about: About) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(about.place / "trackio"))  # read while it is imported
        import trackio

        self._trackio = trackio
        space = os.environ.get("TRACKIO_SPACE_ID") or None
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or "kiln",
            name=f"{about.name} {about.id}",
            space_id=space,
            config=about.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"the Space {space}" if space else f"{os.environ['TRACKIO_DIR']} (`trackio show` shows it)"
        if not about.resumed:
            trackio.log({"plan": trackio.Markdown(about.plan)}, step=0)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def images(self, step: int, samples: list[Sample]) -> None:
        shown = {f"sample/{s.number:02d}": self._trackio.Image(str(s.path), caption=s.prompt) for s in samples}
        self._trackio.log(shown, step=step)

    def finish(self, *, exit_code: int) -> None:  # noqa: ARG002 (it keeps none)
        self._trackio.finish()
