"""The secrets with which files are asked for, and which service each of them is for: none is sent to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from entrypoint.settings import Settings
    from entrypoint.settings.row import Secret

CLOUDS = ("AWS_", "GOOGLE_", "AZURE_")  # beginnings of the variables that tools of buckets read


@dataclass(frozen=True)
class Keys:
    """What the user has set. `hosts`: name of a host, with its port if it has one → token."""

    hub: str | None = field(default=None, repr=False)
    civitai: str | None = field(default=None, repr=False)
    hosts: Mapping[str, str] = field(default_factory=dict, repr=False)
    clouds: Mapping[str, str] = field(default_factory=dict, repr=False)  # the variables of S3, Google and Azure

    @classmethod
    def of(cls, settings: Settings, environ: Mapping[str, str]) -> Keys:
        tokens = {host: token.reveal() for host, token in settings.model.download_tokens.items()}
        clouds = {name: value for name, value in environ.items() if name.startswith(CLOUDS)}
        return cls(_revealed(settings.model.hf_token), _revealed(settings.model.civitai_token), tokens, clouds)

    def for_host(self, address: str) -> dict[str, str]:
        """The header for an address of a host that has a token of its own."""
        token = self.hosts.get(urlsplit(address).netloc.lower())
        return {"Authorization": f"Bearer {token}"} if token else {}


NO_KEYS = Keys()


def _revealed(secret: Secret | None) -> str | None:
    return secret.reveal() if secret else None
