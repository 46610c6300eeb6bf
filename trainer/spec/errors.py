"""The job's errors, each with the exit code that engines decide by (BSD sysexits). Standard library only."""

from __future__ import annotations


class KilnError(Exception):
    """A problem that the user can act on. The message names the variable or file, the value and the fix."""

    logged = False  # whether the log has the message already
    exit_code = 70
    advice = "This is a bug in Kiln or numbers gone bad: see the log above and run.log."


class SettingsError(KilnError):
    """A setting, dataset.json, prompts.txt or plan that cannot be carried out."""

    exit_code = 78
    advice = "Correct the settings named above and start again; nothing was trained."


class GatedError(KilnError):
    """The Hub refuses the model or dataset: no token, a wrong one, or a licence not accepted."""

    exit_code = 77
    advice = "Accept the licence on the page named above, set HF_TOKEN, and start again."


class UnreachableError(KilnError):
    """A network or service failure that retries did not cure."""

    exit_code = 75
    advice = "Start the same job again later: what was downloaded is kept."


class NoAcceleratorError(UnreachableError):
    """This machine has no GPU, or has lost it, and the model needs one."""

    advice = (
        "On a rented machine, start the same job again: it may have come back without its GPU. On a computer without "
        "one, `python -m entrypoint --check --gpu 'RTX 4090'` checks this job for a card that is not here, "
        "`python -m entrypoint.runpod deploy` rents one, and base models with names like mini-… try everything out "
        "on a CPU."
    )


class StorageError(KilnError):
    """No room, not writable, or an input/output error on a volume."""

    exit_code = 74
    advice = "Free space or fix the volume, then start the same job again: it resumes automatically."


class DataError(KilnError):
    """No usable training data."""

    exit_code = 65
    advice = "Fix the dataset as described above and start again."


class NumbersError(KilnError):
    """The loss or a gradient is not a finite number."""

    exit_code = 70
    advice = "Lower PARAMS_LEARNING_RATE or check the images named above; the last checkpoint is good."


class OutOfMemoryError(KilnError):
    """Memory ran out in the middle of training, and smaller micro-batches did not help."""

    exit_code = 75
    advice = "Start the same job again where more memory is free, or lower PARAMS_RESOLUTION; it resumes automatically."


class HangError(KilnError):
    """No step for far longer than a step takes."""

    exit_code = 75
    advice = "Start the same job again: it resumes automatically. hang.txt has the stacks of all threads."


class PeerError(KilnError):
    """Another process of the same job has ended. The entrypoint takes that one's exit code, and never this."""

    exit_code = 76
    advice = "The log of the other process has the reason."


class CrashLoopError(KilnError):
    """The same job has failed at the same place again and again."""

    exit_code = 70
    advice = "Fix the problem named above, or delete crashes.json to try the same again."


class FileMismatchError(KilnError):
    """A written LoRA file is not what was trained."""

    exit_code = 70
    advice = (
        "This is a bug in Kiln, or memory or a disk that fails. Nothing is lost: the LoRA is kept as .unverified, and "
        "the state is saved. Starting again trains nothing and ends the same way at once. To have the file written "
        "again, delete crashes.json, or set another PARAMS_SAVE_PRECISION."
    )


class StopRequestedError(KilnError):
    """SIGTERM (143) or SIGINT (130); the state is saved. No error: the log has one plain line."""

    advice = "Start the same command again to go on: it resumes automatically."

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def last_line(self) -> str:
        return f"{self} {self.advice} [exit {self.exit_code}]"
