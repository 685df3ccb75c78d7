# Copyright (c) 2026, the megatron-core gptoss authors.

"""Positional read and write of safetensors, against the safetensors library."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.gpt_oss.checkpoint.hf.safetensors_file import SafetensorsFile, SafetensorsWriter
from megatron.gpt_oss.errors import CheckpointError


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(5, 7, 6, generator=generator).to(torch.bfloat16),
        "vector": torch.randn(11, generator=generator),
        "scalar": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
        "bytes": torch.randint(0, 256, (3, 5), dtype=torch.uint8, generator=generator),
    }


@pytest.mark.parametrize(
    "index",
    [
        (),
        (2,),
        (slice(1, 4),),
        (2, slice(1, 3)),
        (2, 3),
        (slice(None), slice(2, 5)),
        (slice(None), 4),
        (2, slice(None), slice(1, 4)),
        (slice(0, 1), slice(0, 7), slice(5, 6)),
        (slice(3, 3),),
        (4, 6, 5),
    ],
)
def test_parts(tensors, tmp_path, index):
    save_file(tensors, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    part = file.read("matrix", index)
    assert torch.equal(part, tensors["matrix"][index]) and part.is_contiguous()
    part.zero_()  # its own memory
    assert torch.equal(file.read("matrix", index), tensors["matrix"][index])


def test_whole_tensors_of_every_dtype(tensors, tmp_path):
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x")
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        read = file.read(name)
        assert torch.equal(read, tensor) and read.dtype == tensor.dtype, name
    file.close()
    with pytest.raises(OSError):
        file.read("matrix")


def test_written_in_any_order(tensors, tmp_path):
    known = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(tmp_path / "y", known) as writer:
        writer.write("bytes", tensors["bytes"][1:], 1)
        for row in (4, 0, 1, 3, 2):
            writer.write("matrix", tensors["matrix"][row], row)
        writer.write("bytes", tensors["bytes"][:1])
        writer.write("scalar", tensors["scalar"])
        writer.write("vector", tensors["vector"])
    assert (tmp_path / "y").stat().st_size == writer.size
    loaded = load_file(tmp_path / "y")
    assert list(loaded) == sorted(tensors) or set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype, name


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data[:-1], "expected {size} bytes from its header"),
        (lambda data: data[:20], "its header should have"),
        (lambda data: b"", "its header should have 0 bytes"),
        (lambda data: data[:8] + b"X" + data[9:], "its header cannot be read"),
        (
            lambda data: data.replace(
                b'"dtype":"BF16","shape":[5,7,6]', b'"dtype":"BF16","shape":[5,7,7]'
            ),
            r"'matrix' has 420 bytes, expected 490 for BF16 (5, 7, 7)",
        ),
    ],
)
def test_damaged(tensors, tmp_path, damage, words):
    save_file(tensors, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(damage(data))
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(tmp_path / "x")
    found = len(damage(data))
    assert f"{tmp_path}/x ({found} bytes) is damaged or truncated" in str(error.value)
    assert words.format(size=len(data)) in str(error.value)


def test_cut_short_while_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    with open(tmp_path / "x", "r+b") as other:
        other.truncate(file.entries["matrix"].start + 10)
    with pytest.raises(CheckpointError, match="410 bytes before the end of a tensor"):
        file.read("matrix")
