"""Kubernetes: a Job whose podFailurePolicy knows our exit codes, or a TrainJob of Kubeflow; for Kueue with its label.

https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy,
https://www.kubeflow.org/docs/components/trainer/, https://kueue.sigs.k8s.io/docs/tasks/run/jobs/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entrypoint.engines.again import loop, with_image_variables
from entrypoint.engines.documents import GRACE_S, Document, as_yaml
from entrypoint.engines.gpu_names import KUBERNETES_GPU, KUBERNETES_MEMORY
from entrypoint.engines.request import STOPPED_EXIT_CODE, Request
from entrypoint.processes.supervise import PERMANENT_FAILURES

NAMES: dict[str, object] = {}  # clusters label their nodes with the memory of their GPUs
TRIES = 6
MEMORY_MARGIN_MIB = 512


def make(request: Request, *, kind: str, queue: str) -> Document:
    """The manifest, as `kubectl apply` takes it. `kind`: job or trainjob. `queue`: of Kueue, or ""."""
    labels = {"app.kubernetes.io/name": "kiln"}
    if queue:
        labels["kueue.x-k8s.io/queue-name"] = queue
    metadata = {"name": request.name, "labels": labels}
    trees = [_train_job(request, metadata)]
    if kind == "job":
        trees = [_job(request, metadata)]
        if request.nodes > 1:
            trees.insert(0, _service(request))
    before = []
    if request.secrets:
        echoed = "; ".join(f"printf '%s=%s\\n' {name} \"${name}\"" for name in request.secrets)
        before.append(f"{{ {echoed}; }} | kubectl create secret generic {_secret(request)} --from-env-file=/dev/stdin")
    notes = []
    if not request.storage:
        notes.append("No --storage: a pod that is started again begins anew. Name a PersistentVolumeClaim.")
    file = f"{request.name}.k8s.yaml"
    start = ("kubectl", "apply", "-f", file)
    return Document(
        file, as_yaml(*trees), start, "kubectl", "https://kubernetes.io/docs/tasks/tools", tuple(before), tuple(notes)
    )


def _secret(request: Request) -> str:
    return f"{request.name}-secrets"


def _job(request: Request, metadata: dict[str, Any]) -> dict[str, Any]:
    again = [code for code in (75, STOPPED_EXIT_CODE) if code in request.again]
    at_once = [*PERMANENT_FAILURES, *(() if STOPPED_EXIT_CODE in again else (STOPPED_EXIT_CODE,))]
    policy = [
        # First: a pod that is evicted ends with 143 too, and that is no failure of the job.
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": sorted(at_once)}},
        {"action": "Count", "onExitCodes": {"operator": "In", "values": again}},
    ]
    container = {
        "name": "trainer",
        "image": request.image,
        "args": ["train"],
        "env": _environment(request, _meeting_point(request)),
        "resources": _resources(request),
        "volumeMounts": _mounts(),
        "livenessProbe": {
            "exec": {"command": ["/opt/venv/bin/python", "-m", "entrypoint.health"]},
            "initialDelaySeconds": 60,
            "periodSeconds": 60,
            "timeoutSeconds": 10,
        },
    }
    if request.page:
        container["ports"] = [{"name": "monitor", "containerPort": request.page}]
    pod = {
        "restartPolicy": "Never",  # what a podFailurePolicy needs
        "terminationGracePeriodSeconds": GRACE_S,
        **_where(request),
        "containers": [container],
        "volumes": _volumes(request),
    }
    # All pods of several end together, and each counts as a failure.
    spec: dict[str, Any] = {"backoffLimit": TRIES * request.nodes, "podFailurePolicy": {"rules": policy}}
    if request.nodes > 1:
        spec |= {"completionMode": "Indexed", "completions": request.nodes, "parallelism": request.nodes}
        pod["subdomain"] = request.name
    spec["template"] = {"spec": pod}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _service(request: Request) -> dict[str, Any]:
    """A headless service gives the pods of an indexed Job names, also those that are not ready."""
    selector = {"batch.kubernetes.io/job-name": request.name}
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": request.name}, "spec": spec}


def _meeting_point(request: Request) -> dict[str, str]:
    """What an indexed Job does not say: how many pods there are, and the name of the first."""
    if request.nodes == 1:
        return {}
    return {"NODES": str(request.nodes), "MASTER_ADDR": f"{request.name}-0.{request.name}"}


def _train_job(request: Request, metadata: dict[str, Any]) -> dict[str, Any]:
    """Kubeflow's runtime decides about failures, by the pods' number alone: 75 is tried again inside."""
    trainer = {
        "image": request.image,
        "command": ["sh", "-c", loop(with_image_variables())],
        "env": _environment(request, {}),
        "numNodes": request.nodes,
        "resourcesPerNode": _resources(request),
    }
    pod = {
        "terminationGracePeriodSeconds": GRACE_S,
        **_where(request),
        "containers": [{"name": "node", "volumeMounts": _mounts()}],
        "volumes": _volumes(request),
    }
    jobs = [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]
    patch = {"manager": "kiln/job", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}
    spec = {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer, "runtimePatches": [patch]}
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}


def _environment(request: Request, more: Mapping[str, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, value in {**request.variables, **more}.items():
        # Kubernetes would read $(NAME) as a reference to another variable.
        found.append({"name": name, "value": value.replace("$(", "$$(")})
    for name in request.secrets:
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": _secret(request), "key": name}}})
    return found


def _resources(request: Request) -> dict[str, Any]:
    return {
        "requests": {"cpu": str(4 * request.count), "memory": "32Gi"},
        "limits": {KUBERNETES_GPU: str(request.count)},
    }


def _where(request: Request) -> dict[str, Any]:
    """A node whose GPUs have the memory of the smallest that fits."""
    least = str(request.least_memory_mib - MEMORY_MARGIN_MIB)
    term = {"matchExpressions": [{"key": KUBERNETES_MEMORY, "operator": "Gt", "values": [least]}]}
    required = {"nodeSelectorTerms": [term]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}


def _mounts() -> list[dict[str, str]]:
    return [{"name": "workspace", "mountPath": "/workspace"}, {"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108 # nosec B108 (of the pod)


def _volumes(request: Request) -> list[dict[str, Any]]:
    workspace: dict[str, Any] = {"name": "workspace", "emptyDir": {}}
    if request.storage:
        workspace = {"name": "workspace", "persistentVolumeClaim": {"claimName": request.storage}}
    return [workspace, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}]
