"""How figures are told: a JSON line each as they come, and a Markdown table of all of them."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


class Report:
    """Rows of one table. `markdown`: a file to write it to, or None."""

    def __init__(self, title: str, markdown: Path | None) -> None:
        self.title, self.markdown, self.rows = title, markdown, []

    def row(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), flush=True)
        self.rows.append(values)
        if self.markdown:
            self.markdown.write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in self.rows)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{where()}; `python -m bench {' '.join(sys.argv[1:])}`\n\n{body}\n"


def where() -> str:
    """The hardware, and the versions that decide speed."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}, torch {torch.__version__}, diffusers {version('diffusers')}, torchao {version('torchao')}"


def options(what: str | None) -> argparse.ArgumentParser:
    """The options that all measurements of a model have."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, help="a module of trainer.spec.family")
    parser.add_argument("--markdown", type=Path, help="a file for the table")
    parser.add_argument("--small", action="store_true", help="a narrow model, on the CPU: does it run at all?")
    return parser
