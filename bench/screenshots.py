"""Screenshots of the monitor page for docs/: wide and narrow, light and dark.

python -m bench screenshots OUTPUT_PATH [--to docs]

OUTPUT_PATH is the folder of a job, such as `.demo/output` after `make demo`. Needs a Chromium (`apt-get install
chromium`). Writes monitor-WIDTH-light.png and monitor-WIDTH-dark.png.
"""

from __future__ import annotations

import argparse
import io
import sys
import threading
import time
from pathlib import Path

from PIL import Image

from bench.browser import Browser, find
from entrypoint.monitor.documents import Served
from entrypoint.monitor.live import Live
from entrypoint.monitor.server import listen, serve

TOKEN = "the-token-of-a-bench"
SIZES = {1440: 1500, 390: 1500}  # width → height, in pixels
COLOURS = 128  # of a PNG: a page has few, and the file stays small


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs"))
    flags = parser.parse_args(arguments)
    if find() is None:
        sys.exit("No Chromium is here: apt-get install chromium")
    listening = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/#{TOKEN}"
    live = Live(Served(flags.folder.absolute()))
    threading.Thread(target=serve, args=(listening, live, TOKEN), daemon=True).start()
    for width, height in SIZES.items():
        for scheme in ("light", "dark"):
            path = flags.to / f"monitor-{width}-{scheme}.png"
            shoot(address, path, width=width, height=height, dark=scheme == "dark")
            print(path)


def shoot(address: str, path: Path, *, width: int, height: int, dark: bool) -> None:
    """One screenshot, once everything is drawn."""
    with Browser(width=width, height=height, dark=dark) as browser:
        browser.open(address)
        browser.wait_for("document.querySelectorAll('#charts figure').length > 1")
        browser.wait_for("document.querySelectorAll('#grid img').length > 1")
        seen = "[...document.images].filter((image) => image.getBoundingClientRect().top < innerHeight)"
        browser.wait_for(f"{seen}.every((image) => image.complete && image.naturalWidth)")
        time.sleep(0.5)  # for the last frame
        browser.screenshot(path)
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
