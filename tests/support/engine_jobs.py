"""The jobs that `python -m entrypoint job` prints, for the tests of each engine."""

import os

from entrypoint import __main__ as entrypoint

TOKEN = "hf_" + "Ab3" * 10
HOOK = "https://hooks.example.com/services/T0123/B0123/Zx9Zx9Zx9Zx9"
PASSWORD = "pA55word99"
KEYED = f"https://me:{PASSWORD}@example.com/images.zip"
# A text with what shells, YAML and Kubernetes take for theirs.
TRIGGER = 'it\'s "a" $(zot) $HOME: {x}'
JOB = {
    "BASE_MODEL": "flux",
    "DATASET_NAME": "org/images",
    "TRIGGER_WORD": TRIGGER,
    "HF_TOKEN": TOKEN,
    "WEBHOOK_URL": HOOK,
}
STORAGE = {
    "sky": "s3://bucket/kiln",
    "dstack": "kiln-volume",
    "hf": "hf://buckets/org/kiln",
    "k8s": "kiln-claim",
    "slurm": "/shared/kiln",
    "vast": "12345",
    "modal": "kiln-volume",
    "runpod": "abc123",
}
ENGINES = tuple(STORAGE)


def printed(capsys, caplog, engine, *arguments, **variables):
    """The exit code, what is printed on stdout, and what on stderr and in the log."""
    words = ["job", engine, "--image", "ghcr.io/me/kiln:0.1.0", *arguments]
    if "--storage" not in arguments:
        words += ["--storage", STORAGE[engine]]
    caplog.clear()
    code = entrypoint.main(words, {"PATH": os.environ["PATH"], **JOB, **variables})
    out = capsys.readouterr()
    return code, out.out, out.err + caplog.text
