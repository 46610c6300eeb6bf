"""In place of wandb: the calls that Kiln makes, with the library's own arguments, written down."""

import os

from PIL import Image as PillowImage
from recorded import record


class Settings:
    def __init__(
        self, *, console="auto", silent=False, disable_code=False, disable_git=False, x_disable_machine_info=False,
        x_disable_meta=False, x_save_requirements=True,
    ):  # fmt: skip
        self.values = {name: value for name, value in locals().items() if name != "self"}


class Html:
    def __init__(self, data, inject=True):
        self.value = {"html": data}


class Image:
    def __init__(self, data_or_path, mode=None, caption=None):
        with PillowImage.open(data_or_path) as image:
            self.value = {"size": list(image.size), "file": os.path.basename(data_or_path), "caption": caption}


class Run:
    url = None  # of an offline run

    def define_metric(self, name, step_metric=None, hidden=None):
        record("define_metric", name=name, step_metric=step_metric, hidden=hidden)

    def log(self, data, step=None, commit=None):
        shown = {key: getattr(value, "value", value) for key, value in data.items()}
        record("log", data=shown, step=step, commit=commit)

    def finish(self, exit_code=None):
        record("finish", exit_code=exit_code)


def init(project=None, *, dir=None, id=None, name=None, config=None, mode=None, resume=None, settings=None):
    values = {key: value for key, value in locals().items() if key != "settings"}
    record("init", settings=settings.values, **values)
    run = Run()
    if mode == "online":
        run.url = "https://wandb.ai/someone/kiln/runs/1"
    return run
