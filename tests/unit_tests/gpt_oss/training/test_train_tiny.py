# Copyright (c) 2026, the megatron-core gptoss authors.
"""`make train` with few steps: all outputs exist, and a second start resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.harness import commands

ROOT = Path(__file__).resolve().parents[4]


# The installed program; what it writes at the end, nobody reads here.
GPTOSS = f"""
import runpy, sys
if sys.argv[1] == "sample":
    sys.argv += ["--max-new-tokens", "5"]
runpy.run_path({str(Path(sys.executable).with_name("gptoss"))!r}, run_name="__main__")
"""


@pytest.fixture
def programs(tmp_path_factory):
    """A directory whose `gptoss` does not import torch each time; the ranks that it launches do."""
    folder, script = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("script") / "gptoss"
    script.write_text(GPTOSS)
    with commands.stand_in(script, folder):
        yield folder


def train(folder, steps, corpus, programs):
    """The script as a user runs it, on a smaller corpus."""
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", "examples/gpt_oss/train_tiny.sh", str(folder), str(steps)]
    command += ["--data-path", str(corpus), "--save-interval", "2", "--eval-iters", "1"]
    command += ["--split", "80,10,10", "--global-batch-size", "4"]
    command += ["--seq-length", "128"]
    result = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def corpus_of(folder):
    """Some files of the standard library in the place where the script looks for its corpus."""
    from megatron.gpt_oss.cli import main

    names = sorted(Path(json.__file__).parents[1].glob("[a-b]*.py"))
    main(["tokenize", *map(str, names), "--output", str(folder / "data" / "stdlib")])
    return folder / "data" / "stdlib"


def test_program_starts():
    """What pip has written, in a process of its own."""
    gptoss = Path(sys.executable).with_name("gptoss")
    done = subprocess.run([gptoss, "presets"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tiny", "20b", "120b"]


def test_train_tiny_and_resume(tmp_path, programs):
    (tmp_path / "data").mkdir()
    corpus = corpus_of(tmp_path)
    first = train(tmp_path, 4, corpus, programs)
    assert f"starts from {tmp_path}/init" in first and "step 4/4" in first
    second = train(tmp_path, 6, corpus, programs)
    assert "resumed at step 4" in second and "step 5/6" in second and "step 4/6" not in second

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert abs(steps[0]["loss"] - torch.tensor(270.0).log()) < 0.1
    assert steps[-1]["loss"] < steps[0]["loss"]
    wanted = {"learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes", "tokens"}
    assert all(wanted <= record.keys() for record in steps)

    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "checkpoints" / "iter_0000006").is_dir()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("import os\n" * 20, return_tensors="pt").input_ids
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert 2.0 < loss < steps[0]["loss"]
