"""Our writer of safetensors files, against the library that reads them."""

import hashlib
import threading
import time

import pytest
import safetensors.torch
import torch

from trainer.storage import safetensors_writer
from trainer.storage.safetensors_writer import DTYPES, encode_header, is_finite, layout, same_bits, sha256


def written(tensors, path):
    entries, data = layout(tensors)
    path.write_bytes(b"".join([encode_header(entries), *data]))
    return path


def test_every_type_and_shape_is_read_back_by_the_library(tmp_path):
    torch.manual_seed(0)
    tensors = {
        f"{name}{i}": (torch.rand(shape) * 100).to(dtype)
        for dtype, name in DTYPES.items()
        for i, shape in enumerate([(), (3,), (0, 4), (5, 7)])
    }
    back = safetensors.torch.load_file(written(tensors, tmp_path / "x"))
    assert back.keys() == tensors.keys()
    assert all(back[k].shape == v.shape and same_bits(back[k], v) for k, v in tensors.items())


def test_the_bytes_are_those_that_the_library_writes(tmp_path):
    tensors = {"b": torch.rand(3, 2), "a": torch.rand(5), "half": torch.rand(3).half(), "long": torch.arange(3)}
    assert written(tensors, tmp_path / "x").read_bytes() == safetensors.torch.save(tensors)


def test_a_tensor_that_is_not_contiguous_is_written_in_the_order_of_its_rows(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    back = safetensors.torch.load_file(written({"t": whole.T, "row": whole[1]}, tmp_path / "x"))
    assert torch.equal(back["t"], whole.T) and torch.equal(back["row"], whole[1])


def test_a_type_that_the_format_does_not_have_is_refused():
    with pytest.raises(TypeError, match="complex64"):
        layout({"x": torch.zeros(2, dtype=torch.complex64)})


def test_the_digest_is_that_of_the_file(tmp_path):
    entries, data = layout({"x": torch.rand(1000)})
    path = written({"x": torch.rand(3)}, tmp_path / "x")
    path.write_bytes(b"".join([encode_header(entries), *data]))
    assert sha256([encode_header(entries), *data]) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("count", [1, 8, 13, 64])
def test_one_changed_bit_anywhere_is_another_tensor(dtype, count):
    raw = torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8)
    for place in range(len(raw)):
        other = raw.clone()
        other[place] ^= 1
        assert not same_bits(raw.view(dtype), other.view(dtype))
    assert same_bits(raw.view(dtype), raw.clone().view(dtype))


def test_equal_bits_are_the_same_also_of_nan():
    assert same_bits(torch.tensor([float("nan"), -0.0]), torch.tensor([float("nan"), -0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32)) and not same_bits(
        torch.zeros(2), torch.zeros(1, 2)
    )
    assert same_bits(torch.zeros(9, dtype=torch.uint8)[1:], torch.zeros(8, dtype=torch.uint8)), "not aligned"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_seen(bad):
    for place in (0, 500, 999):
        values = torch.rand(10, 100)
        values.view(-1)[place] = bad
        assert not is_finite(values) and not is_finite(values.half())
    assert is_finite(torch.full((1000,), torch.finfo(torch.float32).max)), "the sum is not, the values are"
    assert is_finite(torch.rand(3, 3)) and is_finite(torch.empty(0)) and is_finite(torch.tensor(1.0))


@pytest.mark.alone
def test_other_threads_run_while_a_large_file_is_written(tmp_path):
    """Training runs in one of them: it must not wait for Python's lock for as long as a copy of everything takes."""
    tensors = {str(i): torch.zeros(2**22) for i in range(32)}  # 512 MiB
    gaps, ended = [], threading.Event()

    def work():
        last = time.perf_counter()
        while not ended.wait(0.001):
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()

    thread = threading.Thread(target=work)
    thread.start()
    entries, data = safetensors_writer.layout(tensors)
    safetensors_writer.sha256(data)
    with (tmp_path / "x").open("wb") as file:
        file.writelines([safetensors_writer.encode_header(entries), *data])
    all(safetensors_writer.is_finite(t) and same_bits(t, t.clone()) for t in tensors.values())
    ended.set()
    thread.join()
    print(f"\nlongest time that another thread waited: {1000 * max(gaps):.0f} ms")
    assert max(gaps) < 0.2
