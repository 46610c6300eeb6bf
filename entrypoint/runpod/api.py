"""A small client of RunPod's REST API v2.

It repeats requests whose failure may pass, and turns RunPod's problem documents (RFC 9457) into this program's errors:
every method may raise UnreachableError (RunPod stays away), GatedError (the key is refused) and SettingsError (the
request is refused).

Schemas: https://docs.runpod.io/api-reference-v2. Lists come wrapped in an object; a pod is created with POST /v2/pods
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
from trainer.network import addresses
from trainer.network.errors import HopelessError
from trainer.spec.errors import GatedError, KilnError, SettingsError, UnreachableError
from trainer.spec.values import one_line

if TYPE_CHECKING:
    import httpx

HOST = "https://api.runpod.io"
KEYS_PAGE = "https://console.runpod.io/user/settings"
GRAPHQL_MUTATIONS = {"stop": "podStop", "terminate": "podTerminate"}
# A log's connection that is silent for longer is opened again. Long, because a job prints nothing while it loads.
LOG_SILENCE_S = 90.0
LONGEST_REASON = 1000  # characters
ADVICE = {  # by HTTP status
    402: "Add credit to the account.",
    404: "Check the id: `python -m entrypoint.runpod status` lists your pods.",
    409: "The pod's state does not allow it: `python -m entrypoint.runpod status` shows the state.",
}


@dataclass(frozen=True)
class RunPod:
    """A client with the rights of one API key: an account's, or the one that RunPod sets inside each pod."""

    key: str = field(repr=False)
    host: str = HOST
    retries: RetryPolicy = http.USUAL

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], *, retries: RetryPolicy = http.USUAL) -> RunPod:
        """From RUNPOD_API_KEY and RUNPOD_API_BASE_URL. Raises SettingsError for a key that is missing or is none."""
        key = environ.get("RUNPOD_API_KEY", "").strip()
        if not key:
            raise SettingsError(f"RUNPOD_API_KEY is not set. Create a key at {KEYS_PAGE} and export it.")
        if not (key.isascii() and key.isprintable()):
            raise SettingsError(f"RUNPOD_API_KEY has characters that no key has. Copy it anew from {KEYS_PAGE}.")
        return cls(key, environ.get("RUNPOD_API_BASE_URL", HOST).rstrip("/"), retries)

    # ---- catalog, templates

    def gpus(self, *, cloud: str, count: int) -> list[dict[str, Any]]:
        """All GPU types, with their prices and the stock for pods of `count` GPUs."""
        query = {"include": "AVAILABILITY", "product": "POD", "cloud": cloud, "count": str(count)}
        return _list(self._call("GET", "/v2/catalog/gpus", params=query), "gpus")

    def put_template(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Create the template `body["name"]`, or update the one with that name; also returns whether it is new."""
        existing = _named(_list(self._call("GET", "/v2/templates"), "templates"), body["name"])
        if existing is None:
            return self._call("POST", "/v2/templates", body=body), True
        return self._call("PATCH", f"/v2/templates/{quote(existing['id'], safe='')}", body=body), False

    # ---- pods

    def create_pod(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create one pod, whose name must be unique.

        When RunPod's answer is lost, the pod may exist or not. Each further try first looks for its name, so that no
        second pod is created and paid for.
        """
        tries = 0

        def create() -> dict[str, Any]:
            nonlocal tries
            tries += 1
            if tries > 1:
                existing = _named(_list(self._once("GET", "/v2/pods"), "pods"), body["name"])
                if existing is not None:
                    return existing
            return self._once("POST", "/v2/pods", body=body)

        return http.persist(create, what=f"{self.host}/v2/pods", retries=self.retries)

    def pods(self) -> list[dict[str, Any]]:
        return _list(self._call("GET", "/v2/pods"), "pods")

    def pod(self, pod_id: str) -> dict[str, Any]:
        return self._call("GET", f"/v2/pods/{quote(pod_id, safe='')}")

    def act(self, pod_id: str, action: str) -> None:
        """Start, stop, restart or terminate a pod. Raises SettingsError if the pod's state does not allow it."""
        self._call("POST", f"/v2/pods/{quote(pod_id, safe='')}/action", body={"action": action})

    def act_by_graphql(self, pod_id: str, action: str) -> None:
        """Stop or terminate a pod through the older GraphQL API. Raises the errors of `act`."""
        query = f"mutation end($id: String!) {{ {GRAPHQL_MUTATIONS[action]}(input: {{podId: $id}})"
        # podStop returns the pod, of which GraphQL wants fields to be selected; podTerminate returns nothing.
        query += " { id desiredStatus } }" if action == "stop" else " }"
        answer = self._call("POST", "/graphql", body={"query": query, "variables": {"id": pod_id}})
        if answer.get("errors"):
            errors = json.dumps(answer["errors"])[:300]
            raise SettingsError(f"{self.host}/graphql refuses {GRAPHQL_MUTATIONS[action]}: {errors}.")

    def log_lines(self, pod_id: str, *, tail: int, cursor: str | None = None) -> Iterator[tuple[str, str]]:
        """Yield (event id, log line) until the server ends the stream (server-sent events).

        `tail` is the number of past lines to begin with; `cursor` the id of the last event seen, after which to
        continue. Raises TransientError when the connection breaks or is silent for LOG_SILENCE_S.
        """
        import httpx

        from trainer.network.client import CONTENT, Content, errors_as_ours, open_client

        headers = {"Accept": "text/event-stream", **self._headers()}
        if cursor:
            headers["Last-Event-ID"] = cursor
        url = f"{self.host}/v2/pods/{quote(pod_id, safe='')}/logs"
        timeouts: Any = httpx.Timeout(self.retries.timeout, read=LOG_SILENCE_S)
        asked: dict[str, Any] = {"headers": headers, "params": {"tail": str(tail)}, "timeout": timeouts}
        asked["extensions"] = {CONTENT: Content()}
        try:
            with open_client(slowest=0) as client, errors_as_ours(), client.stream("GET", url, **asked) as answer:
                if answer.status_code != 200:
                    answer.read()
                    http.check_status(answer, "RunPod")
                    raise refusal(answer, f"GET {url}")
                yield from _events(answer)
        except HopelessError as problem:
            raise problem.about(url) from problem

    # ---- requests

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "User-Agent": "kiln"}

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One request, repeated while its failure may pass: only for requests that do no harm when done twice."""
        return http.persist(
            lambda: self._once(method, path, params=params, body=body),
            what=f"{self.host}{path}",
            retries=self.retries,
        )

    def _once(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One request without a retry. Raises TransientError for a failure that may pass."""
        # Late: the pod's supervisor imports this module, and needs an HTTP client only at its end.
        from trainer.network.client import open_client

        if problem := addresses.problem_of(self.host):
            raise SettingsError(
                f"RUNPOD_API_BASE_URL={addresses.shown(self.host)}: {problem}. Unset it, or write {HOST}."
            )
        asked: dict[str, Any] = {"params": params, "json": body, "headers": self._headers(), "follow_redirects": False}
        with open_client(timeout=self.retries.timeout) as client:
            answer = client.request(method, f"{self.host}{path}", **asked)
        http.check_status(answer, "RunPod")
        if not answer.is_success:
            raise refusal(answer, f"{method} {path}")
        content = http.parse_json(answer, "RunPod") if answer.content else {}
        if not isinstance(content, dict):
            return {}
        return content


def _events(answer: httpx.Response) -> Iterator[tuple[str, str]]:
    """(event id, log line) of a stream of server-sent events. What is no log line is left out."""
    event_id = ""
    for row in answer.iter_lines():
        name, _, value = row.partition(":")
        if name == "id":
            event_id = value.strip()
        elif name == "data":
            try:
                line = json.loads(value)["line"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            yield event_id, one_line(str(line))


def _list(answer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The objects under `name` in an answer. Raises UnreachableError where it is not one of RunPod."""
    found = answer.get(name)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise UnreachableError(f"RunPod's answer has no list of {name} (RUNPOD_API_BASE_URL leads to something else?).")
    return found


def _named(items: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The template or pod with this name, if there is one."""
    for item in items:
        if item.get("name") == name:
            return item
    return None


def refusal(answer: httpx.Response, request: str) -> KilnError:
    """The error for an answer that no retry changes."""
    try:
        problem = answer.json()
        reason = f"{problem['title']}: {problem['detail']}"
        for error in problem.get("errors", ()):
            reason += f"; {error}"
    except (ValueError, KeyError, TypeError, RecursionError):
        reason = "no reason given"
    reason = one_line(reason[:LONGEST_REASON])
    status = answer.status_code
    if status in (401, 403):
        return GatedError(
            f"RunPod refuses {request} ({status}, {reason}). Check RUNPOD_API_KEY and its rights at {KEYS_PAGE}."
        )
    advice = ADVICE.get(status, "Change the request.")
    return SettingsError(f"RunPod refuses {request} ({status}, {reason}). {advice}")
