"""Runs trainers without the seconds that each start spends on imports: a process that has imported all forks them.

Reads a JSON object a line, {"plan", "log", "fault"}; answers with the child's process number, then with its exit code.
No thread has been started and nothing computed before the fork. On an accelerator, which no fork may share, each
trainer is a process of its own instead.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback

import torch


def child(asked):
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        if asked.get("fault"):
            import inject

            inject.install(asked["fault"])
        from trainer.__main__ import main

        code = main([asked["plan"]])
        if asked.get("modules"):
            with open(asked["modules"], "w") as file:
                json.dump(sorted(sys.modules), file)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    import trainer.job.run  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        if "import" in asked:
            for name in asked["import"]:
                try:
                    importlib.import_module(name)
                except Exception:  # noqa: BLE001 (a module that is a part of another)
                    continue
            print(json.dumps({"imported": len(sys.modules)}), flush=True)
            continue
        if torch.cuda.is_available():
            number = subprocess.Popen([sys.executable, __file__, line]).pid
        else:
            number = os.fork()
            if number == 0:
                child(asked)
        print(json.dumps({"pid": number}), flush=True)
        _, status = os.waitpid(number, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        child(json.loads(sys.argv[1]))
    serve()
