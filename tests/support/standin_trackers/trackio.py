"""In place of trackio: the calls that Kiln makes, with the library's own arguments, written down."""

import os

from PIL import Image as PillowImage
from recorded import record

FOLDER = os.environ["TRACKIO_DIR"]  # the library reads it while it is imported


class Markdown:
    def __init__(self, text=""):
        self.value = {"markdown": text}


class Image:
    def __init__(self, value, caption=None):
        with PillowImage.open(value) as image:
            self.value = {"size": list(image.size), "file": os.path.basename(value), "caption": caption}


def init(
    project, name=None, space_id=None, config=None, resume="never", embed=True, auto_log_gpu=None, auto_log_cpu=None
):
    values = dict(locals())
    record("init", folder=FOLDER, **values)


def log(metrics, step=None):
    record("log", metrics={key: getattr(value, "value", value) for key, value in metrics.items()}, step=step)


def finish():
    record("finish")
