"""What a LoRA adds to a weight, by the formulas of the papers in numpy; and a file that holds nothing else."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from trainer.lora_files import write
from trainer.lora_files.weights import LoraWeights
from trainer.lora_files.write import write_lora
from trainer.spec.errors import NumbersError, StorageError

RNG = np.random.default_rng(2)


def tensor(*shape):
    return torch.tensor(RNG.normal(size=shape)).float()


LINEAR = LoraWeights(tensor(2, 5), tensor(6, 2), 0.5)
CONVOLUTION = LoraWeights(tensor(2, 5, 3, 1), tensor(6, 2, 1, 1), 0.5)
DORA = LoraWeights(tensor(2, 5), tensor(6, 2), 0.5, tensor(6).abs())


def added(lora):
    """scale * sum over r of up[o, r] down[r, ...]."""
    down, up = lora.down.double().numpy(), lora.up.double().numpy().reshape(len(lora.up), -1)
    return lora.scale * np.einsum("or,r...->o...", up, down)


@pytest.mark.parametrize("lora", [LINEAR, CONVOLUTION])
def test_a_lora_adds_its_product(lora):
    assert lora.delta().shape == added(lora).shape
    np.testing.assert_allclose(lora.delta(), added(lora), rtol=1e-5, atol=1e-6)
    weight = torch.ones(*lora.delta().shape, dtype=torch.bfloat16)
    merged = lora.applied_to(weight)
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(merged, 1 + added(lora), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (5, 3, 1)])
def test_dora_gives_each_row_of_the_sum_its_norm(shape):
    magnitude = torch.arange(1.0, 7)
    ones = [1] * (len(shape) - 1)
    lora = LoraWeights(tensor(2, *shape), tensor(6, 2, *ones), 0.5, magnitude)
    weight = tensor(6, *shape)
    merged = lora.applied_to(weight).numpy()
    np.testing.assert_allclose(np.linalg.norm(merged.reshape(6, -1), axis=1), magnitude, rtol=1e-5)
    plain = weight.numpy() + added(lora)
    for row, expected in zip(merged.reshape(6, -1), plain.reshape(6, -1), strict=True):  # in the same direction
        assert row @ expected == pytest.approx(np.linalg.norm(row) * np.linalg.norm(expected), rel=1e-5)


@pytest.mark.parametrize(("lora", "numbers"), [(LINEAR, 10 + 12), (CONVOLUTION, 30 + 12), (DORA, 10 + 12 + 6)])
def test_its_bytes_are_those_of_its_numbers(lora, numbers):
    assert lora.nbytes == 4 * numbers and lora.rank == 2


def test_the_scale_is_folded_into_up():
    for lora in (LINEAR, CONVOLUTION, DORA):
        folded = lora.folded()
        assert folded.scale == 1.0 and folded.down is lora.down and folded.magnitude is lora.magnitude
        torch.testing.assert_close(folded.up, 0.5 * lora.up)
        assert folded.folded() is folded


def test_on_the_cpu_it_is_the_same():
    for lora in (LINEAR, DORA):
        moved = lora.to_cpu()
        assert (moved.down is lora.down, moved.up is lora.up, moved.scale) == (True, True, 0.5)
        assert moved.magnitude is lora.magnitude


def test_every_tensor_comes_to_the_cpu():
    class Elsewhere:
        def __init__(self, name):
            self.name = name

        def cpu(self):
            return self.name

    moved = LoraWeights(Elsewhere("down"), Elsewhere("up"), 0.5, Elsewhere("magnitude")).to_cpu()
    assert (moved.down, moved.up, moved.scale, moved.magnitude) == ("down", "up", 0.5, "magnitude")


def test_a_convolution_of_one_pixel_is_a_linear_layer():
    flat = LoraWeights(tensor(2, 5, 1, 1), tensor(6, 2, 1, 1), 0.5).without_kernel()
    assert (flat.down.shape, flat.up.shape, flat.scale) == ((2, 5), (6, 2), 0.5)
    assert LINEAR.without_kernel() is LINEAR and CONVOLUTION.without_kernel() is CONVOLUTION


# ---- the file

TENSORS = {"b": torch.ones(2), "a": torch.zeros(3)}


def test_the_file_has_the_tensors_and_its_header_in_order(tmp_path):
    path = tmp_path / "x.safetensors"
    write_lora(path, TENSORS, {"z": "1", "a": "2"})
    with safe_open(path, "pt") as file:
        assert {key: file.get_tensor(key).tolist() for key in sorted(TENSORS)} == {"a": [0, 0, 0], "b": [1, 1]}
        about = file.metadata()
    assert about.pop("modelspec.hash_sha256") == f"0x{about.pop('sshs_model_hash')}"
    assert about == {"z": "1", "a": "2"}
    text = path.read_bytes()
    places = [text.index(f'"{key}":'.encode()) for key in ("a", "modelspec.hash_sha256", "sshs_model_hash", "z")]
    assert places == sorted(places)
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_none_are_not_written(tmp_path):
    bad = {**TENSORS, "c": torch.tensor([1.0, float("nan")]), "d": torch.tensor([float("inf")])}
    with pytest.raises(NumbersError, match="2 of 4 tensors of the LoRA are not finite, c first"):
        write_lora(tmp_path / "x.safetensors", bad, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "instead",
    [{"a": torch.zeros(3)}, {**TENSORS, "c": torch.ones(1)}, {**TENSORS, "a": torch.tensor([0.0, 0.0, 1.0])}],
)
def test_a_file_that_does_not_read_back_gets_no_name(tmp_path, monkeypatch, instead):
    """A tensor is missing, one is too many, one number is another."""
    content = write._serialised(instead, {})
    monkeypatch.setattr(write, "_serialised", lambda tensors, metadata: content)
    with pytest.raises(StorageError, match="does not read back"):
        write_lora(tmp_path / "x.safetensors", TENSORS, {})
    assert not list(tmp_path.iterdir())
