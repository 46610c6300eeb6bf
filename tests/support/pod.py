"""A local server that stands in for RunPod's API v2: it enforces the shapes of the published openapi.json, on what it
is asked as on what it answers, and the rules that its texts tell. Only the parts that are used here.

Written after https://docs.runpod.io/api-reference-v2 (version 2.0.0 of the document, August 2026).
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from jsonschema import Draft202012Validator

KEY = "rpa_canaryKEY"
TEXT, WHOLE, NUMBER, YES_NO = ({"type": t} for t in ("string", "integer", "number", "boolean"))
VERSION = {"type": "string", "pattern": r"^\d+\.\d+$"}
NAME = {"type": "string", "minLength": 1}


def one_of(*values):
    return {"type": "string", "enum": list(values)}


def or_null(kind):
    return {**kind, "type": [kind["type"], "null"]}


def shape(required="", *, closed=True, **properties):
    found = {"type": "object", "required": required.split(), "properties": properties}
    return {**found, "additionalProperties": False} if closed else found


CLOUD, CATEGORY = one_of("SECURE", "COMMUNITY"), one_of("CPU", "NVIDIA", "AMD")
STATUS = one_of("PROVISIONING", "STARTING", "RUNNING", "EXITED", "ERROR", "TERMINATED")
ACTION = one_of("start", "stop", "restart", "terminate")
PERSISTENT = shape("size path", size={"type": "integer", "minimum": 10}, path=TEXT)
NETWORK = {"type": "array", "maxItems": 1, "items": shape("volumeId path", volumeId=TEXT, path=TEXT)}
CONTAINER = {
    "args": TEXT,
    "disk": {"type": "integer", "minimum": 1},
    "env": {"type": "object", "additionalProperties": TEXT},
    "image": TEXT,
    "ports": {"type": "array", "items": TEXT},
    "registry": or_null(TEXT),
}
GPU = {"id": TEXT, "count": {"type": "integer", "minimum": 1}}
TEMPLATE = {
    **CONTAINER, "name": NAME, "allowedCudaVersions": {"type": "array", "items": VERSION}, "category": CATEGORY,
    "mounts": shape(persistent=PERSISTENT), "public": YES_NO, "serverless": YES_NO, "startJupyter": YES_NO,
    "startSsh": YES_NO,
}  # fmt: skip
SSH = or_null(shape("host port username command", host=TEXT, port=WHOLE, username=TEXT, command=TEXT))
SCHEMAS = {
    "CreatePodRequest": {
        **shape(
            "name", **CONTAINER, name=NAME, cloud=CLOUD, cpu={"type": "object"},
            dataCenterIds={"type": "array", "items": TEXT}, globalNetworking=YES_NO,
            gpu=shape("id", **GPU, allowedCudaVersions={"type": "array", "items": VERSION}, minCudaVersion=VERSION),
            mounts=shape(persistent=PERSISTENT, network=NETWORK), startJupyter=YES_NO, startSsh=YES_NO, templateId=NAME,
        ),
        "if": {"not": {"required": ["templateId"]}},
        "then": {"required": ["image"]},
    },
    "Pod": shape(
        "id name status actions image args disk mounts ports env registry cloud dataCenterId cudaVersion ssh template "
        "cost locked runtime createdAt startedAt globalNetworking",
        **CONTAINER, id=TEXT, name=TEXT, status=STATUS, actions={"type": "array", "items": ACTION}, cloud=CLOUD,
        mounts=shape(persistent=PERSISTENT, network=NETWORK), gpu=shape("id", **GPU), dataCenterId=or_null(TEXT),
        cudaVersion=or_null(TEXT), ssh=shape("proxy direct", proxy=SSH, direct=SSH), template=or_null(TEXT),
        cost=NUMBER, locked=YES_NO, runtime=or_null({"type": "object"}), createdAt=TEXT, startedAt=or_null(TEXT),
        globalNetworking={"type": "object"},
    ),
    "PodActionRequest": shape("action", action=ACTION),
    "CreateTemplateRequest": shape("name image", **TEMPLATE),
    "UpdateTemplateRequest": shape(**TEMPLATE),
    "Template": shape(
        "id name image args disk mounts ports env registry serverless public category startSsh startJupyter "
        "allowedCudaVersions",
        **TEMPLATE, id=TEXT,
    ),
    "GpuType": shape(
        "id name pool manufacturer memory secure community price maxCount",
        id=TEXT, name=TEXT, pool=or_null(TEXT), manufacturer=one_of("NVIDIA", "AMD", "UNKNOWN"), memory=WHOLE,
        secure=YES_NO, community=YES_NO, price=shape("secure community", secure=NUMBER, community=NUMBER,
        serverless=NUMBER), maxCount=shape("secure community", secure=WHOLE, community=WHOLE),
        availability=one_of("NONE", "LOW", "MEDIUM", "HIGH"),
    ),
    "ErrorResponse": shape(
        "title status detail", title=TEXT, status=WHOLE, detail=TEXT, errors={"type": "array", "items": TEXT}
    ),
}  # fmt: skip
for _schema in SCHEMAS.values():
    Draft202012Validator.check_schema(_schema)


def violations(name, value):
    return [f"{e.json_path}: {e.message}" for e in Draft202012Validator(SCHEMAS[name]).iter_errors(value)]


def gpu(id_, name, memory, secure, community, *, maker="NVIDIA", stock="HIGH"):
    return {
        "id": id_, "name": name, "pool": None, "manufacturer": maker, "memory": memory, "secure": secure > 0,
        "community": community > 0, "price": {"secure": secure, "community": community},
        "maxCount": {"secure": 8, "community": 4}, "availability": stock,
    }  # fmt: skip


GPUS = [
    gpu("NVIDIA GeForce RTX 4090", "RTX 4090", 24, 0.69, 0.34),
    gpu("NVIDIA H100 80GB HBM3", "H100 SXM", 80, 2.99, 0, stock="LOW"),
    gpu("NVIDIA H100 PCIe", "H100 PCIe", 80, 2.39, 1.99),
    gpu("AMD Instinct MI300X OAM", "MI300X", 192, 2.49, 0, maker="AMD"),
]
ALLOWED = {
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    asked: str  # "POST /v2/pods"
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    lost: bool = False  # it is done, but no answer comes


class RunPodServer:
    """`with RunPodServer() as server:`; `server.url` is for RUNPOD_API_BASE_URL."""

    def __init__(self):
        self.pods, self.templates, self.lines = {}, {}, {}
        self.faults, self.asked, self.wrong = [], [], []
        self.on_action = lambda pod, action: None
        self.on_logs = lambda pod: None  # after a stream of them
        self.graphql = []
        self.cut_logs_after = None  # lines; then the connection ends

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"world": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def fault(self, asked, **what):
        self.faults.append(Fault(asked, **what))

    def add_pod(self, id_="pod1", status="RUNNING", **fields):
        count = fields.get("gpu", {}).get("count", 1)
        known = next((g for g in GPUS if g["id"] == fields.get("gpu", {}).get("id")), GPUS[0])
        cloud = fields.get("cloud", "SECURE")
        open_ssh = "22/tcp" in fields.get("ports", []) and status == "RUNNING"
        direct = {"host": "195.0.2.3", "port": 34446, "username": "root", "command": "ssh root@195.0.2.3 -p 34446"}
        self.pods[id_] = {
            "name": "kiln", "image": "x", "args": "", "disk": 25, "ports": [], "env": {}, "registry": None,
            "mounts": {}, "cloud": cloud, "dataCenterId": "EU-1",
            "cudaVersion": "13.0", "template": None, "locked": False, "globalNetworking": {"enabled": False},
            "runtime": None, "createdAt": "2026-11-01T00:00:00Z", "startedAt": None,
            **{k: v for k, v in fields.items() if k in SCHEMAS["Pod"]["properties"]},
            "gpu": {"id": known["id"], "count": count}, "id": id_, "status": status, "actions": ALLOWED[status],
            "cost": known["price"][cloud.lower()] * count if status != "EXITED" else 0.0,
            "ssh": {"proxy": None, "direct": direct if open_ssh else None},
        }  # fmt: skip
        return self.pods[id_]


class _Handler(BaseHTTPRequestHandler):
    world: RunPodServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self._answer()

    do_POST = do_PATCH = do_GET

    def _answer(self):
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        asked = f"{self.command} {path}"
        self.world.asked.append((asked, body))
        fault = next((f for f in self.world.faults if f.times and f.asked == asked), None)
        if fault:
            fault.times -= 1
            if fault.status:
                self._problem(fault.status, "Trouble", "ordered by the test", headers=fault.headers)
                return
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self._problem(401, "Unauthorized", "invalid API key")
            return
        routes = {
            r"GET /v2/pods": self._pods, r"POST /v2/pods": self._create, r"GET /v2/pods/([^/]+)": self._pod,
            r"POST /v2/pods/([^/]+)/action": self._act, r"GET /v2/pods/([^/]+)/logs": self._logs,
            r"GET /v2/templates": self._templates, r"POST /v2/templates": self._new_template,
            r"PATCH /v2/templates/([^/]+)": self._change_template, r"GET /v2/catalog/gpus": self._gpus,
            r"POST /graphql": self._graphql,
        }  # fmt: skip
        self.lost = bool(fault and fault.lost)
        for pattern, route in routes.items():
            if found := re.fullmatch(pattern, asked):
                route(*found.groups(), body=body, query=query)
                return
        self._problem(404, "Not Found", f"no route {asked}")

    # ---- answers

    def _send(self, status, value, name=None, headers=None):
        if name and (found := violations(name, value)):
            self.world.wrong += found  # the stand-in itself is wrong
        if self.lost:
            self.close_connection = True
            self.connection.close()
            return
        kind = "application/problem+json" if name == "ErrorResponse" else "application/json"
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(data)

    def _problem(self, status, title, detail, errors=None, headers=None):
        self.lost = False
        value = {"title": title, "status": status, "detail": detail, **({"errors": errors} if errors else {})}
        self._send(status, value, "ErrorResponse", headers)

    def _refused(self, name, body):
        if found := violations(name, body):
            self._problem(422, "Unprocessable Entity", "the body does not match", found)
        return bool(found)

    # ---- routes

    def _pods(self, *, body, query):
        self._send(200, {"pods": list(self.world.pods.values())})

    def _create(self, *, body, query):
        if self._refused("CreatePodRequest", body):
            return
        if ("gpu" in body) == ("cpu" in body) or len(body.get("mounts", {})) > 1 or len(body.get("env", {})) > 50:
            self._problem(400, "Bad Request", "one of gpu and cpu, one mount, at most 50 variables")
            return
        known = next((g for g in GPUS if g["id"] == body["gpu"]["id"]), None)
        if known is None or (known["manufacturer"] == "AMD" and "minCudaVersion" in body["gpu"]):
            self._problem(400, "Bad Request", "no instance can be placed")
            return
        pod = self.world.add_pod(f"pod{len(self.world.pods) + 1}", "PROVISIONING", **body)
        self._send(201, pod, "Pod")

    def _found(self, id_):
        if id_ not in self.world.pods:
            self._problem(404, "Not Found", "pod not found")
        return self.world.pods.get(id_)

    def _pod(self, id_, *, body, query):
        if pod := self._found(id_):
            self._send(200, pod, "Pod")

    def _act(self, id_, *, body, query):
        if self._refused("PodActionRequest", body) or not (pod := self._found(id_)):
            return
        action = body["action"]
        if action not in pod["actions"]:
            self._problem(409, "Conflict", f"{action} is not valid while {pod['status']}")
            return
        self.world.on_action(id_, action)
        if action == "terminate":
            del self.world.pods[id_]
            self._send(204, None)
            return
        pod["status"] = "EXITED" if action == "stop" else "STARTING"
        pod["actions"] = ALLOWED[pod["status"]]
        self._send(200, pod, "Pod")

    def _logs(self, id_, *, body, query):
        if self._found(id_) is None:
            return
        assert set(query) <= {"tail", "since", "source"} and 0 <= int(query.get("tail", 100)) <= 5000
        lines = self.world.lines.get(id_, [])
        seen = self.headers.get("Last-Event-ID")
        start = int(seen.rpartition("/")[2]) + 1 if seen else max(0, len(lines) - int(query.get("tail", 100)))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        stop = len(lines) if self.world.cut_logs_after is None else start + self.world.cut_logs_after
        for number, line in list(enumerate(lines))[start:stop]:
            value = {"ts": "2026-11-01T00:00:00Z", "source": "container", "line": line}
            self.wfile.write(f"id: 2026-11-01T00:00:00Z/{number:012d}\ndata: {json.dumps(value)}\n\n".encode())
        self.close_connection = True
        self.world.on_logs(id_)
        time.sleep(0.01)

    def _templates(self, *, body, query):
        self._send(200, {"templates": list(self.world.templates.values())})

    def _new_template(self, *, body, query):
        if not self._refused("CreateTemplateRequest", body):
            self._keep(f"tpl{len(self.world.templates) + 1}", body, 201)

    def _change_template(self, id_, *, body, query):
        if not self._refused("UpdateTemplateRequest", body):
            self._keep(id_, {**self.world.templates[id_], **body}, 200)

    def _keep(self, id_, body, status):
        usual = {
            "args": "", "disk": 20, "mounts": {}, "ports": [], "env": {}, "registry": None, "serverless": False,
            "public": False, "category": "NVIDIA", "startSsh": True, "startJupyter": True, "allowedCudaVersions": [],
        }  # fmt: skip
        self.world.templates[id_] = {**usual, **body, "id": id_}
        self._send(status, self.world.templates[id_], "Template")

    def _gpus(self, *, body, query):
        if ("include" in query) != ("product" in query):
            self._problem(400, "Bad Request", "include=AVAILABILITY and product go together")
            return
        for each in GPUS:
            self.world.wrong += violations("GpuType", each)
        self._send(200, {"gpus": GPUS})

    def _graphql(self, *, body, query):
        self.world.graphql.append(body)
        self.world.on_action(body["variables"]["id"], "stop")
        self._send(200, {"data": {}})
