"""Messages as the log writes them.

Most messages shorten and escape what they quote; `LineFormatter` is the last place, which all of them pass, so that
nothing in a name or a value acts on a terminal, and nothing that looks like a secret is in a log.
"""

from __future__ import annotations

import logging
import re

from trainer.spec.messages.secrets import Known, without_secrets

LONGEST_LINE = 2_000  # characters
KEPT = LONGEST_LINE // 2 - 20  # at each end of a longer line
# Control characters but for line breaks and tabs, lone surrogates, Unicode's line breaks, and marks that nobody sees or
# that turn the direction of the text after them.
RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# A further line of a message that looks like the first one of another message.
LIKE_A_MESSAGE = re.compile(r"\n(?=\d\d:\d\d:\d\d |\d{4}-\d\d-\d\d \d\d:)")


def escaped(text: str) -> str:
    """`text` with raw characters escaped."""
    return RAW.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def safe_lines(text: str) -> str:
    """`text` with raw characters escaped, and without the middle of lines that are very long."""
    text = escaped(text)
    if len(text) <= LONGEST_LINE:
        return text
    return "\n".join(_shortened(line) for line in text.split("\n"))


def _shortened(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[:KEPT]} … {line[-KEPT:]}"


class LineFormatter(logging.Formatter):
    """Formats a record as `safe_lines`, without secrets. No line of a message can pass for another message."""

    def __init__(
        self, line_format: str | None = None, *, datefmt: str | None = None, known: Known | None = None
    ) -> None:
        super().__init__(line_format, datefmt)
        self._known = known or Known(())

    def format(self, record: logging.LogRecord) -> str:
        # Known secrets first: of one that is shortened, or hidden in part, nobody would know the rest.
        text = safe_lines(without_secrets(self._known.hide(super().format(record))))
        return LIKE_A_MESSAGE.sub("\n  ", text)


def log_to(stream: logging.Handler, line_format: str, *, level: int = logging.INFO, known: Known | None = None) -> None:
    """What `logging.basicConfig` does: a handler for all, unless there is one already. `known`: secrets to hide."""
    stream.setFormatter(LineFormatter(line_format, datefmt="%H:%M:%S", known=known))
    logging.basicConfig(level=level, handlers=[stream])
    logging.captureWarnings(True)  # else they go to the terminal as they are
