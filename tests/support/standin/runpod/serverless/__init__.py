import json
import os
import sys
from pathlib import Path


def start(config):
    job = json.loads(Path("test_input.json").read_text())
    result = config["handler"]({"id": "local_test", **job})
    error = result.pop("error", None)
    print(f"Job result: {json.dumps(result)} {error}")
    sys.exit(1 if error else 0)


def progress_update(job, progress):
    with open(os.environ["PROGRESS_FILE"], "a") as file:
        file.write(json.dumps([job["id"], progress]) + "\n")
