# Copyright (c) 2026, the megatron-core gptoss authors.

"""The progress bar of the commands: amount, note, earlier work; nothing without a terminal."""

import io
import re
import sys

from megatron.gpt_oss.checkpoint.export_hf import export_hf
from megatron.gpt_oss.checkpoint.import_hf import convert_to_megatron
from megatron.gpt_oss.progress import advance, progress_bar
from tests.harness.models import TINY, trained_tensors, write_hf


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(10 * 10**9, initial=2 * 10**9) as bar:
        for number in (1, 2, 3):
            advance(bar, 10**9, f"file {number}")
    shown = sys.stderr.getvalue().split("\r")
    assert shown[1].startswith(" 20%") and "2.00G/10.0G" in shown[1]  # of an earlier process
    assert shown[-1].startswith(" 50%") and "5.00G/10.0G" in shown[-1]
    assert shown[-1].endswith("file 3]\n")


def test_no_terminal(capsys):
    with progress_bar(10) as bar:
        advance(bar, 5, "x")
    assert capsys.readouterr().err == ""


def test_conversions_show_it(tmp_path, monkeypatch):
    hf = write_hf(tmp_path / "hf", TINY, trained_tensors(TINY))
    for convert in (
        lambda: convert_to_megatron(hf, tmp_path / "m", progress=True),
        lambda: export_hf(tmp_path / "m", tmp_path / "back", progress=True),
    ):
        monkeypatch.setattr(sys, "stderr", Terminal())
        convert()
        last = sys.stderr.getvalue().rstrip().split("\r")[-1]
        assert re.fullmatch(r"100%\|.*\| (\S+)/\1 \[.*(distcp|safetensors)\]", last), last
