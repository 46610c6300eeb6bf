"""A parser of arguments whose answers have the exit codes of a job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from trainer.spec.log_lines import safe_lines
from trainer.spec.messages.secrets import without_secrets
from trainer.spec.values import as_integer, show

USAGE_ERROR = 64  # BSD sysexits, as the job's
LARGEST_COUNT = 1_000_000
LONGEST_MESSAGE = 1_000  # characters


class Parser(argparse.ArgumentParser):
    """Ends with 64 for a wrong command line and 0 for --help."""

    def parse_args(  # type: ignore[override]  # one signature for all of argparse's overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """The options. Raises SystemExit."""
        if args is None:
            args = sys.argv[1:]
        if any("\0" in argument for argument in args):  # no name and no text has one
            self.error("an argument holds a null byte")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises SystemExit with 64, after the usage and what is wrong, which quotes what was given."""
        message = safe_lines(without_secrets(message))
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}…"
        self.exit(USAGE_ERROR, f"{self.format_usage()}{self.prog}: {message}\n")


def whole(low: int) -> Callable[[str], int]:
    """The type of an argument that is a number of things, `low` or more."""

    def read(text: str) -> int:
        number = as_integer(text.strip())
        if number is None or not low <= number <= LARGEST_COUNT:
            raise argparse.ArgumentTypeError(f"{show(text)} is not a whole number, {low} to {LARGEST_COUNT}")
        return number

    return read
