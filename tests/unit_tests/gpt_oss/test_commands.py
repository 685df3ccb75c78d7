# Copyright (c) 2026, the megatron-core gptoss authors.

"""The `gptoss` command, the loss plot and sampling."""

import json
import subprocess
import sys

import pytest
import torch

from megatron.gpt_oss import cli
from megatron.gpt_oss.data.byte_tokenizer import write_byte_tokenizer
from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer
from megatron.gpt_oss.diagnostics.sample import generate, sample_hf
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.metrics.jsonl import read_metrics
from megatron.gpt_oss.training.metrics.plot import plot_loss


def _gptoss(*argv):
    cli.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "hf"
    _gptoss("init-tiny", folder, "--seed", 4)
    return folder


def test_tokenize(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    _gptoss("tokenize", tmp_path, "--output", tmp_path / "data" / "x")
    printed = capsys.readouterr()
    assert "1 documents, 4 tokens from 1 files, 0.0 % of the tokens" in printed.out
    assert "tokens/s; 1 skipped" in printed.out
    assert "skipped" in printed.err and "b.txt: not UTF-8" in printed.err
    assert (tmp_path / "data" / "x.idx").is_file()
    assert (tmp_path / "data" / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "argv, words",
    [
        (("tokenize", "/nope/x.txt", "--output", "/nope/y"), "/nope/x.txt: no file"),
        (("sample", "/nope"), "No directory /nope"),
        (("plot", "/nope/metrics.jsonl", "/nope/loss.png"), "No file /nope/metrics.jsonl"),
        (("convert", "to-hf", "--load", "/nope", "--out", "/nope/out"), "No directory /nope"),
        (("presets", "huge"), "Unknown preset 'huge'"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        _gptoss(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_presets_are_listed(capsys):
    _gptoss("presets")
    assert capsys.readouterr().out.split() == ["tiny", "20b", "120b"]
    _gptoss("presets", "20b")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["hidden_size"] == "2880" and lines["window_size"] == "(127, 0)"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = tmp_path / "metrics.jsonl"
    records = [
        {"step": s, "loss": 5.0 - s, "learning_rate": 1e-3, "grad_norm": 1.0} for s in (1, 2, 3)
    ]
    records += [
        {"step": 3, "valid_loss": 2.5},
        {"step": 2, "loss": 2.9, "learning_rate": 1e-3},
        {"event": "resumed"},
    ]
    text = "\n".join(map(json.dumps, records))
    metrics.write_text(text + '\n{"step": 4, "lo')  # a killed run
    assert read_metrics(metrics) == records
    _gptoss("plot", metrics, tmp_path / "figures" / "loss.png")
    data = (tmp_path / "figures" / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000
    plot_loss(metrics, tmp_path / "loss.png", title="a\udcff" * 100_000)  # not UTF-8, and long
    metrics.write_text('{"step": 1, "lo\n' + text)
    with pytest.raises(UsageError, match="line 1: not JSON"):
        plot_loss(metrics, tmp_path / "loss.png")
    metrics.write_text("")
    with pytest.raises(UsageError, match="no record"):
        plot_loss(metrics, tmp_path / "loss.png")


def test_generate_draws_known_tokens_and_stops_at_the_end(tmp_path):
    write_byte_tokenizer(tmp_path)
    tokenizer = load_text_tokenizer(tmp_path)

    def count_up(ids):
        """The next byte is the last one plus one; rows past the tokenizer are likelier still."""
        logits = torch.zeros(1, ids.shape[1], 270)
        logits[0, -1, (ids[0, -1] + 1) % 256] = 50
        logits[0, -1, 260] = 99
        if ids.shape[1] == 5:
            logits[0, -1, 256] = 80
        return logits

    for temperature in (0, 0.5):
        text = generate(count_up, tokenizer, "a", 10, temperature)
        assert text == "abcde"
    assert generate(count_up, tokenizer, "a", 2, 0) == "abc"
    flat = lambda ids: torch.zeros(1, ids.shape[1], 270)
    samples = {generate(flat, tokenizer, "a", 20, 1.0, seed) for seed in (1, 1, 2)}
    assert len(samples) == 2


def test_sample_of_a_folder_agrees_with_transformers(tiny):
    transformers = pytest.importorskip("transformers")
    text = sample_hf(tiny, "def f(x):", max_new_tokens=12, temperature=0)
    reference = transformers.GptOssForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.tensor([list(b"def f(x):")])
    for _ in range(12):
        with torch.no_grad():
            token = reference(ids).logits[0, -1, :257].argmax()
        ids = torch.cat((ids, token.view(1, 1)), dim=1)
    assert text == load_text_tokenizer(tiny).decode(ids[0].tolist())
    assert not torch.distributed.is_initialized()
    with pytest.raises(UsageError, match="--max-new-tokens 0"):
        sample_hf(tiny, "x", max_new_tokens=0)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed):
    """The next file to be opened must not get the number of a stream."""
    code = (
        "import os; from megatron.gpt_oss.errors import run_main\n"
        "def main(): print(1); raise SystemExit(3 if open(os.devnull).fileno() > 2 else 4)\n"
        "run_main(main)"
    )
    command = f'exec "$0" -c "$1" {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, code], capture_output=True)
    assert (done.returncode, done.stderr) == (3, b"")
    command = f'exec "$0" -m megatron.gpt_oss.cli presets {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
