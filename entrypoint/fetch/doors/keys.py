"""The secrets with which files are asked for, and which service each of them is for: none is sent to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from entrypoint.settings import Settings
from entrypoint.settings.row import Secret


@dataclass(frozen=True)
class Keys:
    """What the user has set. `hosts`: name of a host, with its port if it has one → token."""

    hub: str | None = field(default=None, repr=False)
    civitai: str | None = field(default=None, repr=False)
    hosts: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Keys:
        tokens = {host: token.reveal() for host, token in settings.model.download_tokens.items()}
        return cls(_revealed(settings.model.hf_token), _revealed(settings.model.civitai_token), tokens)

    def for_host(self, address: str) -> dict[str, str]:
        """The header for an address of a host that has a token of its own."""
        token = self.hosts.get(urlsplit(address).netloc.lower())
        return {"Authorization": f"Bearer {token}"} if token else {}


def _revealed(secret: Secret | None) -> str | None:
    return secret.reveal() if secret else None
