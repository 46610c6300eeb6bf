"""What is printed may be lost; the job goes on, says so once, and Python does not end with 120."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PRINTS = """
import logging, sys
from trainer.process import streams
streams.protect()
logging.basicConfig(level=logging.INFO, handlers=[logging.StreamHandler(), logging.FileHandler(sys.argv[1])])
for number in range(200):
    print("output", number)
    logging.info("line %d", number)
sys.exit(streams.output_code() if "result" in sys.argv else 0)
"""


def run(tmp_path, *words, **streams):
    arguments = [sys.executable, "-c", PRINTS, str(tmp_path / "run.log"), *words]
    done = subprocess.Popen(arguments, cwd=ROOT, **streams)
    return done, tmp_path / "run.log"


@pytest.mark.parametrize("which", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_full_volume_under_the_output_ends_no_job(tmp_path, which):
    with open("/dev/full", "w") as full:
        given = {name: full if name in which else subprocess.PIPE for name in ("stdout", "stderr")}
        process, log = run(tmp_path, **given)
        printed = b"".join(part for part in process.communicate() if part).decode()
    assert process.returncode == 0 and "Traceback" not in printed and "Logging error" not in printed
    name = "Standard error" if "stderr" in which else "Standard output"
    warning = f"{name} cannot be written (No space left on device)"
    assert log.read_text().count("line ") == 200 and log.read_text().count(warning) == 1
    if len(which) == 1:
        assert printed.count(warning) == 1


def test_a_reader_that_leaves_is_no_error(tmp_path):
    ours, theirs = os.pipe()
    process, log = run(tmp_path, "result", stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert process.wait() == 0 and log.read_text().count("line ") == 200


def test_a_result_that_is_lost_is_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        process, _ = run(tmp_path, "result", stdout=full, stderr=subprocess.PIPE)
        assert process.communicate()[1].count(b"cannot be written") == 1 and process.returncode == 74


def test_a_terminal_that_goes_away(tmp_path):
    """Writing to it is an input/output error from then on."""
    ours, theirs = pty.openpty()
    process, log = run(tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert process.wait() == 0 and log.read_text().count("line ") == 200
    assert log.read_text().count("Standard error cannot be written (Input/output error)") == 1


def test_a_pipe_that_nobody_empties_is_given_up(tmp_path):
    ours, theirs = os.pipe()
    code = PRINTS.replace("streams.protect()", "streams.PATIENCE_MS = 100; streams.protect()").replace("200", "2000")
    began = time.monotonic()
    arguments = [sys.executable, "-c", code, str(tmp_path / "run.log")]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=theirs, stderr=theirs)
    assert process.wait(timeout=30) == 0 and time.monotonic() - began < 20
    assert (tmp_path / "run.log").read_text().count("line ") == 2000
    os.close(ours)
    os.close(theirs)
