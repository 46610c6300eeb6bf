"""Prints figures: each row as a line of JSON as it comes, and all rows as a Markdown table."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


class Report:
    """The rows of one table. `markdown`: the file of the table, written anew with each row; None: no file."""

    def __init__(self, title: str, markdown: Path | None) -> None:
        self.title = title
        self.markdown = markdown
        self.rows: list[dict[str, Any]] = []

    def row(self, values: dict[str, Any]) -> None:
        """Print a row, and add it to the table."""
        print(json.dumps(values), flush=True)
        self.rows.append(values)
        if self.markdown:
            self.markdown.write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        """The table in Markdown, with hardware, versions and the command line."""
        columns: dict[str, None] = {}  # in the order in which they first occur
        for row in self.rows:
            columns |= dict.fromkeys(row)
        lines = [list(columns), ["---"] * len(columns)]
        for row in self.rows:
            lines.append([str(row.get(column, "")) for column in columns])
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{where()}; `python -m bench {' '.join(sys.argv[1:])}`\n\n{body}\n"


def where() -> str:
    """The hardware, and the versions that decide speed."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}, torch {torch.__version__}, diffusers {version('diffusers')}, torchao {version('torchao')}"


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all measurements of a model have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, help="a module of trainer.families")
    parser.add_argument("--base", default="", help="a value of BASE_MODEL of that family; its first if none is named")
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    parser.add_argument(
        "--small",
        action="store_true",
        help="a narrow model, which runs on a CPU too: checks that the measurement works",
    )
    return parser
