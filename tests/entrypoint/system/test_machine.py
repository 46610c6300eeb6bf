"""What one command asks this machine, it asks once."""

import pytest

from entrypoint import __main__ as entrypoint
from entrypoint.system import hardware
from entrypoint.system.hardware import Hardware
from entrypoint.system.machine import Machine
from trainer.spec.errors import UnreachableError

CARD = Hardware("nvidia", "9.0", 80.0, 2, "580.65", 256.0, 32, "NVIDIA H100 80GB HBM3")


class Torch:
    """In place of the process that imports torch."""

    started = 0

    def __init__(self):
        Torch.started += 1
        self.answers = 0

    def names(self):
        self.answers += 1
        assert self.answers == 1  # the pipe is read once
        return ("sm_90",)


def test_the_devices_and_torch_are_asked_once_and_not_before_they_are_needed(monkeypatch):
    asked = []
    monkeypatch.setattr(hardware, "detect", lambda: asked.append("devices") or CARD)
    monkeypatch.setattr("entrypoint.system.machine.TorchKernels", Torch)
    machine = Machine()
    assert (asked, Torch.started) == ([], 0)
    assert machine.hardware is machine.hardware is CARD
    assert machine.kernels == machine.kernels == ("sm_90",)
    assert (asked, Torch.started) == (["devices"], 1)


def test_a_driver_that_did_not_answer_is_asked_again(monkeypatch):
    answers = [UnreachableError("stuck"), CARD]

    def detect():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(hardware, "detect", detect)
    machine = Machine()
    with pytest.raises(UnreachableError):
        _ = machine.hardware
    assert machine.hardware is CARD


def test_a_check_of_a_queue_asks_the_drivers_tool_once(monkeypatch, tmp_path):
    asked = []
    real = hardware.detect
    monkeypatch.setattr(hardware, "detect", lambda: asked.append("devices") or real())
    (tmp_path / "data").mkdir()
    environ = {
        "BASE_MODEL": "mini-flux",
        "DATASET_NAME": str(tmp_path / "data"),
        "OUTPUT_PATH": str(tmp_path / "out"),
        "CACHE_PATH": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "SWEEP": "PARAMS_SEED=1,2,3",
    }
    assert entrypoint.main(["--check"], environ) == 65  # there are no images
    assert asked == ["devices"]
