"""On PYTHONPATH of a job under test: puts the fault that KILN_FAULT describes into the trainer's process."""

import json
import os
import sys

if "trainer" in sys.orig_argv and "KILN_FAULT" in os.environ:
    from tests.support.faults import inject

    inject.install(json.loads(os.environ["KILN_FAULT"]))
