"""The client of a server that has what earlier processes told it."""

import re
from types import SimpleNamespace

from recorded import calls, record


def run_of(number):
    return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{number}"))


class MlflowClient:
    def __init__(self, tracking_uri=None):
        record("client", tracking_uri=tracking_uri)

    def get_experiment_by_name(self, name):
        created = [call["name"] for call in calls() if call["call"] == "create_experiment"]
        return SimpleNamespace(experiment_id=f"id of {name}") if name in created else None

    def create_experiment(self, name):
        record("create_experiment", name=name)
        return f"id of {name}"

    def search_runs(self, experiment_ids, filter_string="", max_results=1000):
        """Runs with a tag, which is all that is asked for."""
        key, value = re.fullmatch(r"tags\.(\w+) = '(\w+)'", filter_string).groups()
        created = [call for call in calls() if call["call"] == "create_run"]
        found = []
        for number, call in enumerate(created, start=1):
            if call["experiment_id"] in experiment_ids and call["tags"].get(key) == value:
                found.append(run_of(number))
        return found[:max_results]

    def create_run(self, experiment_id, tags=None, run_name=None):
        record("create_run", experiment_id=experiment_id, tags=tags, run_name=run_name)
        return run_of(sum(call["call"] == "create_run" for call in calls()))

    def update_run(self, run_id, status=None):
        record("update_run", run_id=run_id, status=status)

    def log_param(self, run_id, key, value):
        record("log_param", run_id=run_id, key=key, value=value)

    def log_text(self, run_id, text, artifact_file):
        record("log_text", run_id=run_id, text=text, artifact_file=artifact_file)

    def log_batch(self, run_id, metrics=()):
        record("log_batch", run_id=run_id, metrics=[metric.values for metric in metrics])

    def log_image(self, run_id, image, *, key=None, step=None):
        record("log_image", run_id=run_id, size=list(image.size), key=key, step=step)

    def set_terminated(self, run_id, status=None):
        record("set_terminated", run_id=run_id, status=status)
