"""What a stand-in was told: a line of JSON for each call, in the file that RECORDED names."""

import json
import os


def record(call, **arguments):
    """Write a call down. Each line is whole, since it is one write."""
    with open(os.environ["RECORDED"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"call": call, **arguments}) + "\n")


def calls():
    """All calls so far, also of earlier processes."""
    with open(os.environ["RECORDED"], encoding="utf-8") as file:
        return [json.loads(line) for line in file]
