"""Failures of a network: those that may pass, and those that no further try mends."""

from __future__ import annotations

from trainer.spec.errors import KilnError, SettingsError


class TransientError(Exception):
    """A failure that may pass. `wait`: seconds that the server asked us to wait, if it did.

    `unreached`: there was no connection at all, as on a machine without a network.
    """

    def __init__(self, message: str, *, wait: float | None = None, unreached: bool = False) -> None:
        super().__init__(message)
        self.wait = wait
        self.unreached = unreached


class HopelessError(Exception):
    """A failure that no further try mends. `about` makes it an error of the job."""

    def __init__(self, message: str, kind: type[KilnError] = SettingsError) -> None:
        super().__init__(message)
        self.kind = kind  # SettingsError where the user can help, UnreachableError where only the server can

    def about(self, what: str) -> KilnError:
        """The job's error; `what` was asked for."""
        return self.kind(f"{what}: {self}")
