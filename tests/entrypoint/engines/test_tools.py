"""The engines' own parsers. They run where ENGINES_PYTHON names a Python that has them (docs/engines.md).

What they are given is tested everywhere, in test_jobs.py.
"""

import json
import os
import subprocess

import pytest

from tests.support.engine_jobs import HOOK, TOKEN, TRIGGER, printed

PYTHON = os.environ.get("ENGINES_PYTHON", "")
SKY = """
import json, sys, jsonschema, yaml
from sky.utils import schemas
task = yaml.safe_load(sys.stdin)
jsonschema.validate(task, schemas.get_task_schema())
for wanted in task["resources"].get("ordered", [{}]):
    jsonschema.validate({**task["resources"], **wanted}, schemas.get_resources_schema())
import sky
recovery = [r.job_recovery for r in sky.Task.from_yaml_config({**task, "file_mounts": {}}, secrets_overrides=[
    (name, "x") for name in task["secrets"]]).resources]
print(json.dumps([task["envs"]["TRIGGER_WORD"], recovery[0]["recover_on_exit_codes"], task.get("num_nodes")]))
"""
DSTACK = """
import json, sys, yaml
from dstack._internal.core.models.configurations import parse_apply_configuration
task = parse_apply_configuration(yaml.safe_load(sys.stdin))
print(json.dumps([task.env["TRIGGER_WORD"], [event.value for event in task.retry.on_events], task.nodes]))
"""
KUBERNETES = """
import json, sys, kubernetes_validate, yaml
trees = list(yaml.safe_load_all(sys.stdin))
for tree in trees:
    kubernetes_validate.validate(tree, "1.37", strict=True)
print(json.dumps([tree["kind"] for tree in trees]))
"""
TRAINJOB = """
import json, sys, yaml
from kubeflow_trainer_api import models
tree = yaml.safe_load(sys.stdin)
assert models.TrainerV1alpha1TrainJob.from_dict(tree).to_dict() == tree, "a key that Kubeflow does not have"
print(json.dumps([tree["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]]))
"""
VAST = """
import json, shlex, sys
from vastai.api import query
from vastai.api.instances import build_create_instance_payload, resolve_runtype
from vastai.cli import main
from vastai.cli.commands import instances, offers
lines = sys.stdin.read().split("offer=$(")[1]
search = shlex.split(lines.split(" | python3")[0])
main.parser.add_argument("--raw", action="store_true")  # as its main does
found = main.parser.parse_args(search[1:])
asked = query.parse_query(" ".join(found.query), {}, query.offers_fields, query.offers_alias, query.offers_mult)
create = shlex.split(lines[lines.index("exec vastai") :].replace('"$offer"', "77"))
made = main.parser.parse_args(create[2:])
print(json.dumps([sorted(asked), made.image, made.entrypoint, made.args[0], made.mount_path]))
"""
MODAL = """
import json, os, sys, types
text = sys.stdin.read()
module = types.ModuleType("kiln_modal")
sys.modules["kiln_modal"] = module
exec(compile(text, "kiln_modal.py", "exec"), module.__dict__)
print(json.dumps([module.app.name, sorted(module.SECRETS)]))
"""


@pytest.fixture
def asked(capsys, caplog):
    """`asked(program, engine, *arguments)`: what the tool's own code makes of the job that is printed."""
    if not PYTHON:
        pytest.skip("THE ENGINES' PARSERS WERE NOT ASKED: ENGINES_PYTHON names no Python that has them")

    def of(code, engine, *arguments):
        exit_code, out, err = printed(capsys, caplog, engine, *arguments)
        assert exit_code == 0, err
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "HF_TOKEN": TOKEN, "WEBHOOK_URL": HOOK}
        done = subprocess.run(
            [PYTHON, "-c", code], env=environment, input=out, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return of


def test_skypilot_takes_the_task(asked):
    assert asked(SKY, "sky") == [TRIGGER, [143], None]
    assert asked(SKY, "sky", "--env", "NODES=2")[2] == 2
    assert asked(SKY, "sky", "--gpu", "H100", "--count", "2", "--spot")


def test_dstack_takes_the_task(asked):
    assert asked(DSTACK, "dstack", "--spot") == [TRIGGER, ["no-capacity", "interruption"], None]
    assert asked(DSTACK, "dstack", "--env", "NODES=2")[2] == 2


def test_kubernetes_takes_the_job(asked):
    assert asked(KUBERNETES, "k8s", "--queue", "team") == ["Job"]
    assert asked(KUBERNETES, "k8s", "--env", "NODES=2") == ["Service", "Job"]


def test_kubeflow_takes_the_trainjob(asked):
    assert asked(TRAINJOB, "k8s", "--kind", "trainjob", "--queue", "team") == ["team"]
    assert asked(TRAINJOB, "k8s", "--kind", "trainjob", "--queue", "team", "--env", "NODES=2") == ["team"]


def test_vast_takes_the_search_and_the_instance(asked):
    fields, image, entrypoint, first, mount = asked(VAST, "vast", "--spot")
    assert {"gpu_name", "num_gpus", "gpu_ram", "cuda_max_good", "disk_space", "reliability"} <= {*fields}
    assert (image, entrypoint, first, mount) == ("ghcr.io/me/kiln:0.1.0-cuda", "sh", "-c", "/workspace")


def test_modal_takes_the_program(asked):
    assert asked(MODAL, "modal") == ["kiln", ["HF_TOKEN", "WEBHOOK_URL"]]
