"""How a command ends: its errors become one line in the log, and an exit code."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from trainer.spec.errors import KilnError, OutOfMemoryError, SettingsError, StorageError

INTERRUPTED = 130  # by Ctrl-C
# Errors of the system that say that a path is wrong. The others are the volume's.
WRONG_PATHS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EEXIST),
    *(errno.ENXIO, errno.ENODEV),
)


def exit_code_of(command: Callable[[], int | None], log: logging.Logger) -> int:
    """Run a command; returns its exit code, 0 for None.

    What ends it is logged in one line with the code. Only a bug has a traceback, and the code 70, as in a job.
    """
    try:
        return command() or 0
    except KilnError as problem:
        code, message = problem.exit_code, str(problem)
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "Interrupted."
    except MemoryError:
        code, message = OutOfMemoryError.exit_code, "The memory of this machine does not hold this."
    except OSError as problem:
        kind = SettingsError if problem.errno in WRONG_PATHS else StorageError
        place = f"{problem.filename}: " if problem.filename is not None else ""
        code, message = kind.exit_code, f"{place}{problem.strerror or problem}."
    except Exception:
        log.exception("Unexpected error.")
        code, message = KilnError.exit_code, KilnError.advice
    log.error("%s [exit %d]", message, code)
    return code
