"""What the stand-in for the Hub answers to uploads: repositories made, files announced, large ones put, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any


def answer(handler: Any, path: str, token: str, body: bytes) -> None:
    """Answer a request that writes, with the fault that was ordered."""
    hub, fault = handler.hub, handler.ordered
    if fault and fault.stall_at is not None:
        fault.reached.set()
        fault.released.wait()
    if path.startswith("/put/"):  # signed: another host by name, which must not see the token
        assert not token and hashlib.sha256(body).hexdigest() == path.removeprefix("/put/")
        hub.large[path.removeprefix("/put/")] = body
        return reply(handler, {})
    if path == "/api/validate-yaml":
        return reply(handler, {"errors": [], "warnings": []})
    if token not in hub.writers:
        known = token in hub.known_tokens | hub.granted
        return handler._refuse(*((403, None, "Forbidden") if known else (401, None, "Invalid credentials")))
    asked = json.loads(body) if body and "/commit/" not in path else {}
    if path == "/api/repos/create":
        name = f"{asked['organization']}/{asked['name']}"
        hub.add("model", name, {}, private=asked.get("visibility") == "private")
        return reply(handler, {"url": f"{hub.endpoint}/{name}"})
    name = "/".join(path.removeprefix("/api/models/").removeprefix("/").removesuffix(".git").split("/")[:2])
    repo = hub.repos.get(("model", name.removesuffix(".git")))
    if repo is None:
        return handler._refuse(404, "RepoNotFound", "Repository not found")
    if path.endswith("/info/lfs/objects/batch"):
        return reply(handler, {"objects": [announced(hub, thing) for thing in asked["objects"]]})
    if "/preupload/" in path:
        return reply(handler, {"files": [mode(repo, file) for file in asked["files"]]})
    if "/commit/" in path:
        return reply(handler, committed(hub, name, repo, [json.loads(line) for line in body.splitlines()]))
    return reply(handler, {})  # auth-check


def reply(handler: Any, value: dict[str, Any]) -> None:
    handler._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def announced(hub: Any, thing: dict[str, Any]) -> dict[str, Any]:
    if thing["oid"] in hub.large:
        return thing
    href = f"http://localhost:{hub.port}/put/{thing['oid']}?signature=s3cret"
    return {**thing, "actions": {"upload": {"href": href}}}


def mode(repo: Any, file: dict[str, Any]) -> dict[str, Any]:
    """How a file is to be uploaded, and the hash of what is there under its name."""
    large = file["path"].endswith((".safetensors", ".png"))
    there = repo.commits[repo.refs["main"]].get(file["path"])
    oid = None
    if there is not None:
        oid = (
            hashlib.sha256(there).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
        )
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def committed(hub: Any, name: str, repo: Any, lines: list[dict[str, Any]]) -> dict[str, Any]:
    files = dict(repo.commits[repo.refs["main"]])
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            repo.log.append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            files[value["path"]] = hub.large[value["oid"]]
    commit = hub.add("model", name, files)
    return {"commitUrl": f"{hub.endpoint}/{name}/commit/{commit}", "commitOid": commit}
