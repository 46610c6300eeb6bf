"""Where the page is, as somebody opens it. Standard library only: the entrypoint imports it."""

from __future__ import annotations

from collections.abc import Mapping

PORT = 8675  # MONITOR_PORT
SHORTEST_TOKEN = 16  # characters of MONITOR_TOKEN: more than anybody can try


def page_address(environment: Mapping[str, str], *, port: int, token: str = "") -> str:
    """The address of the page on this machine; on RunPod, that of its proxy. `token`: where it may be shown.

    The token is behind the `#`: a browser sends that to no server.
    """
    pod = environment.get("RUNPOD_POD_ID", "").strip()
    place = f"https://{pod}-{port}.proxy.runpod.net/" if pod else f"http://localhost:{port}/"
    return f"{place}#{token}" if token else place
