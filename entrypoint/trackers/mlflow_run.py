"""MLflow: the server that MLFLOW_TRACKING_URI names; without one, files in the run's folder.

Its client alone is installed, which is a small part of the whole program.
"""

from __future__ import annotations

import os

from entrypoint.report.gather import Sample
from entrypoint.trackers.feed import About, moment
from trainer.data.decode import read_sample


class Run:
    """A run of MLflow, found again by a tag after a restart."""

    def __init__(self, about: About) -> None:
        # Its own program refuses folders as stores unless told so; no server is needed for them.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI") or (about.place / "mlruns").as_uri()
        self._client = MlflowClient(tracking_uri=address)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "kiln"
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.kiln_id = '{about.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(experiment, run_name=about.name, tags={"kiln_id": about.id}).info.run_id
            for key, value in about.config.items():
                self._client.log_param(self._id, key.replace(",", ""), value[:500])
            self._client.log_text(self._id, about.plan, "plan.md")
        self.where = "the server of MLFLOW_TRACKING_URI"
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self.where = f"{about.place}/mlruns (`mlflow ui --backend-store-uri` shows it)"

    def numbers(self, step: int, values: dict[str, float]) -> None:
        now = moment()
        self._client.log_batch(self._id, metrics=[self._metric(key, value, now, step) for key, value in values.items()])

    def images(self, step: int, samples: list[Sample]) -> None:
        for sample in samples:
            image = read_sample(sample.path)
            if image is not None:
                self._client.log_image(self._id, image, key=f"sample_{sample.number:02d}", step=step)

    def finish(self, *, exit_code: int) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if exit_code == 0 else "FAILED")
