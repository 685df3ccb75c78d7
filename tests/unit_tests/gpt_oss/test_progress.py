# Copyright (c) 2026, the megatron-core gptoss authors.

"""The live line: share, bytes, rate, time left, tensors; nothing where no terminal is."""

import io
import re

from megatron.gpt_oss import progress
from megatron.gpt_oss.checkpoint.export_hf import export_hf
from megatron.gpt_oss.checkpoint.import_hf import convert_to_megatron
from megatron.gpt_oss.progress import Progress
from tests.harness.models import TINY, trained_tensors, write_hf


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_line(monkeypatch):
    clock = iter([100.0, 101.0, 102.0, 104.0])  # created, then three pieces
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(progress.sys, 'stderr', Terminal())
    with Progress(10e9, 'GB', 1e-9) as bar:
        bar.begin_at(2e9)  # by an earlier process
        for number in (1, 2, 3):
            bar.advance(1e9, f'{number} of 8 tensors')
        shown = progress.sys.stderr.getvalue().split('\r\033[K')[1:]
    assert shown == [
        ' 30.0 %  3.0 of 10.0 GB  1.0 GB/s  7 s left  1 of 8 tensors',
        ' 40.0 %  4.0 of 10.0 GB  1.0 GB/s  6 s left  2 of 8 tensors',
        ' 50.0 %  5.0 of 10.0 GB  0.8 GB/s  7 s left  3 of 8 tensors',
    ]


def test_no_terminal(capsys):
    with Progress(10, 'GB') as bar:
        bar.advance(5)
    assert capsys.readouterr().err == ''


def test_conversions_show_it(tmp_path, monkeypatch):
    hf = write_hf(tmp_path / 'hf', TINY, trained_tensors(TINY))
    line = r'100\.0 %  ([0-9.]+) of \1 GB  [0-9.]+ GB/s  0 s left  (\d+) of \2 (pieces|tensors)'
    for convert in (
        lambda: convert_to_megatron(hf, tmp_path / 'm', progress=True),
        lambda: export_hf(tmp_path / 'm', tmp_path / 'back', progress=True),
    ):
        monkeypatch.setattr(progress.sys, 'stderr', Terminal())
        convert()
        last = progress.sys.stderr.getvalue().rstrip().split('\r\033[K')[-1]
        assert re.fullmatch(line, last), last
