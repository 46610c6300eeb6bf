"""How commands end: every error has a documented exit code, and only a bug has a traceback."""

from __future__ import annotations

import errno
import logging
import os

import pytest

from trainer.spec.commands.ending import exit_code_of
from trainer.spec.errors import GatedError, SettingsError

log = logging.getLogger("a command")


def raising(problem):
    def command():
        raise problem

    return command


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        (SettingsError("No such layer."), 78, "No such layer. [exit 78]"),
        (GatedError("A licence."), 77, "A licence. [exit 77]"),
        (KeyboardInterrupt(), 130, "Interrupted. [exit 130]"),
        (MemoryError(), 75, "memory of this machine"),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x"), 78, "x: File name too long. [exit 78]"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 78, "x: No such file"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 78, "x: Is a directory"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 74, "x: Permission denied. [exit 74]"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 74, "x: No space left on device. [exit 74]"),
        (OSError("without a number"), 74, "without a number. [exit 74]"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(caplog, problem, code, words):
    assert exit_code_of(raising(problem), log) == code
    (record,) = caplog.records
    assert words in record.getMessage() and record.exc_info is None


def test_a_bug_has_a_traceback_and_the_exit_code_of_a_bug(caplog):
    assert exit_code_of(raising(ZeroDivisionError()), log) == 70
    assert caplog.records[0].exc_info is not None and "[exit 70]" in caplog.records[-1].getMessage()


def test_a_commands_own_exit_code_stands():
    assert [exit_code_of(lambda code=code: code, log) for code in (None, 0, 1, 75)] == [0, 0, 1, 75]
