# Copyright (c) 2026, the megatron-core gptoss authors.

"""Byte offsets of tensors in the output of torch.save, against torch.load."""

import io
import os

import pytest
import torch

from megatron.gpt_oss.checkpoint.torch_dist.torch_zip import find_tensor


@pytest.fixture
def save(tmp_path):
    """save(value, crc=True) -> (descriptor, offset, length) of it in the midst of a file."""
    opened = []

    def save(value, crc=True):
        stream = io.BytesIO()
        torch.serialization.set_crc32_options(crc)
        try:
            torch.save(value, stream)
        finally:
            torch.serialization.set_crc32_options(True)
        path = tmp_path / str(len(opened))
        path.write_bytes(b"x" * 37 + stream.getvalue() + b"y" * 1001)
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1], 37, len(stream.getvalue())

    yield save
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize("crc", [True, False], ids=["crc", "no-crc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_bytes_are_those_of_the_tensor(save, dtype, crc):
    tensor = torch.randn(1, 3, 7, 5).to(dtype)
    place = save(tensor, crc)
    first = find_tensor(*place, dtype, (1, 3, 7, 5))
    found = torch.frombuffer(bytearray(os.pread(place[0], tensor.nbytes, first)), dtype=dtype)
    assert torch.equal(found.view(1, 3, 7, 5), tensor)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(4, 4).t(),  # in another order
        torch.randn(6, 4)[1:5],  # a part of its storage
        torch.randn(4, 8)[:, ::2],
        torch.randn(4, 4).double(),
        torch.randn(2, 8),
        torch.randn(4, 4).int(),
        torch.nn.Parameter(torch.randn(4, 4)),
        [torch.randn(4, 4)],
        {"a": 1},
    ],
    ids="transposed offset strided dtype shape integer parameter list dict".split(),
)
def test_all_else_is_for_torch_load(save, value):
    assert find_tensor(*save(value), torch.float32, (4, 4)) is None
    assert find_tensor(*save(torch.randn(4, 4)), torch.float32, (4, 4)) is not None


def test_damaged(save, tmp_path):
    fd, offset, length = save(torch.randn(4, 4))
    assert find_tensor(fd, offset, length - 1, torch.float32, (4, 4)) is None
    assert find_tensor(-1, offset, length, torch.float32, (4, 4)) is None
    (tmp_path / "short").write_bytes(os.pread(fd, offset + length // 2, 0))
    short = os.open(tmp_path / "short", os.O_RDONLY)
    assert find_tensor(short, offset, length, torch.float32, (4, 4)) is None
    os.close(short)


def test_nothing_of_a_pickle_is_called(save, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "called"),)

    assert find_tensor(*save(Evil()), torch.float32, (4, 4)) is None
    assert not (tmp_path / "called").exists()
