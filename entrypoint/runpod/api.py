"""A small client of RunPod's REST API v2: retries, problem documents (RFC 9457) told as this program's errors.

Shapes: https://docs.runpod.io/api-reference-v2. Lists come wrapped in an object; a pod is created with POST /v2/pods
and changed with POST /v2/pods/{id}/action. RUNPOD_API_BASE_URL replaces the host, as in RunPod's own SDK.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from entrypoint.fetch import http
from entrypoint.fetch.http import RetryPolicy
from trainer.spec.errors import GatedError, KilnError, SettingsError

if TYPE_CHECKING:
    import httpx

HOST = "https://api.runpod.io"
KEYS = "https://console.runpod.io/user/settings"
GRAPHQL = {"stop": "podStop", "terminate": "podTerminate"}
SILENT = 90.0  # seconds without a line before a log's connection is made anew


@dataclass(frozen=True)
class RunPod:
    """An account, or the pod that this process runs in."""

    key: str = field(repr=False)
    host: str = HOST
    retries: RetryPolicy = http.USUAL

    @classmethod
    def of(cls, environ: Mapping[str, str], *, retries: RetryPolicy = http.USUAL) -> RunPod:
        """From RUNPOD_API_KEY and RUNPOD_API_BASE_URL. Raises SettingsError without a key."""
        key = environ.get("RUNPOD_API_KEY", "").strip()
        if not key:
            raise SettingsError(f"RUNPOD_API_KEY is not set. Make a key at {KEYS} and export it.")
        return cls(key, environ.get("RUNPOD_API_BASE_URL", HOST).rstrip("/"), retries)

    # ---- catalog, templates

    def gpus(self, *, cloud: str, count: int) -> list[dict[str, Any]]:
        """All GPU types, with prices and what is free for pods of `count` GPUs."""
        asked = {"include": "AVAILABILITY", "product": "POD", "cloud": cloud, "count": str(count)}
        return list(self._call("GET", "/v2/catalog/gpus", params=asked)["gpus"])

    def put_template(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Make the template with this name, or change it if it is there; also whether it was made."""
        known = self._call("GET", "/v2/templates")["templates"]
        same = next((t for t in known if t["name"] == body["name"]), None)
        if same is None:
            return self._call("POST", "/v2/templates", body=body), True
        # A template's category cannot be left out of what is shown, but everything here may be changed.
        return self._call("PATCH", f"/v2/templates/{quote(same['id'], safe='')}", body=body), False

    # ---- pods

    def create_pod(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create one pod. Its name must be unique: after an answer that was lost, the pod is looked for by it, so that
        none is created, and paid for, twice."""
        tries = 0

        def create() -> dict[str, Any]:
            nonlocal tries
            tries += 1
            if tries > 1:
                same = next((p for p in self._once("GET", "/v2/pods")["pods"] if p["name"] == body["name"]), None)
                if same is not None:
                    return dict(same)
            return self._once("POST", "/v2/pods", body=body)

        return http.persist(create, what=f"{self.host}/v2/pods", retries=self.retries)

    def pods(self) -> list[dict[str, Any]]:
        return list(self._call("GET", "/v2/pods")["pods"])

    def pod(self, pod_id: str) -> dict[str, Any]:
        return self._call("GET", f"/v2/pods/{quote(pod_id, safe='')}")

    def act(self, pod_id: str, action: str) -> None:
        """start, stop, restart or terminate. An action that the pod's state does not allow is a SettingsError."""
        self._call("POST", f"/v2/pods/{quote(pod_id, safe='')}/action", body={"action": action})

    def act_by_graphql(self, pod_id: str, action: str) -> None:
        """stop or terminate, by the older interface. Raises as `act`."""
        query = f"mutation end($id: String!) {{ {GRAPHQL[action]}(input: {{podId: $id}})"
        query += " { id desiredStatus } }" if action == "stop" else " }"
        answer = self._call("POST", "/graphql", body={"query": query, "variables": {"id": pod_id}})
        if answer.get("errors"):
            raise SettingsError(f"{self.host}/graphql refuses {GRAPHQL[action]}: {json.dumps(answer['errors'])[:300]}.")

    def log_lines(self, pod_id: str, *, tail: int, cursor: str | None = None) -> Iterator[tuple[str, str]]:
        """The id of each event and its line, until the server ends the stream or falls silent.

        `cursor` is the id of the last event that was seen: the stream goes on after it.
        """
        import httpx

        headers = {"Accept": "text/event-stream", **self._headers(), **({"Last-Event-ID": cursor} if cursor else {})}
        url = f"{self.host}/v2/pods/{quote(pod_id, safe='')}/logs"
        times = httpx.Timeout(self.retries.timeout, read=SILENT)
        try:
            with httpx.stream("GET", url, headers=headers, params={"tail": str(tail)}, timeout=times) as answer:
                if answer.status_code != 200:
                    answer.read()
                    http.check_status(answer, "RunPod")
                    raise refusal(answer, f"GET {url}")
                event = ""
                for row in answer.iter_lines():
                    name, _, value = row.partition(":")
                    if name == "id":
                        event = value.strip()
                    elif name == "data":
                        yield event, str(json.loads(value)["line"])
        except httpx.RequestError as problem:
            raise http.TransientError(f"{type(problem).__name__} ({problem})") from problem

    # ---- requests

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "User-Agent": "kiln"}

    def _call(self, method: str, path: str, *, params: Any = None, body: Any = None) -> dict[str, Any]:
        """One request, repeated while the failure may pass; only for those that may be done twice."""
        return http.persist(
            lambda: self._once(method, path, params=params, body=body),
            what=f"{self.host}{path}",
            retries=self.retries,
        )

    def _once(self, method: str, path: str, *, params: Any = None, body: Any = None) -> dict[str, Any]:
        import httpx

        url = f"{self.host}{path}"
        try:
            answer = httpx.request(
                method, url, params=params, json=body, headers=self._headers(), timeout=self.retries.timeout
            )
        except httpx.RequestError as problem:
            raise http.TransientError(f"{type(problem).__name__} ({problem})") from problem
        http.check_status(answer, "RunPod")
        if not answer.is_success:
            raise refusal(answer, f"{method} {path}")
        try:
            found = answer.json() if answer.content else {}
        except ValueError as problem:
            raise http.TransientError("the answer is not JSON") from problem
        return found if isinstance(found, dict) else {}


def refusal(answer: httpx.Response, asked: str) -> KilnError:
    """The error for an answer that no retry changes."""
    try:
        problem = answer.json()
        told = f"{problem['title']}: {problem['detail']}"
        told += "".join(f"; {each}" for each in problem.get("errors", ()))
    except (ValueError, KeyError, TypeError):
        told = "it does not say why"
    status = answer.status_code
    if status in (401, 403):
        return GatedError(f"RunPod refuses {asked} ({status}, {told}). Check RUNPOD_API_KEY and its rights at {KEYS}.")
    advice = {
        402: "Add credit to the account.",
        404: "Check the id: python -m entrypoint.runpod status lists your pods.",
        409: "The pod's state does not allow it: python -m entrypoint.runpod status shows it.",
    }.get(status, "Change what is asked for.")
    return SettingsError(f"RunPod refuses {asked} ({status}, {told}). {advice}")
