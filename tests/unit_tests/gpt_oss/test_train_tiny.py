# Copyright (c) 2026, the megatron-core gptoss authors.
"""`make train` in a few steps: every artefact is there, and a second start resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[3]


def train(folder, steps, corpus):
    """The script as a user runs it, on a smaller corpus."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", "examples/gpt_oss/train_tiny.sh", str(folder), str(steps)]
    command += ["--data-path", str(corpus), "--save-interval", "2", "--eval-iters", "1"]
    command += ["--split", "80,10,10", "--global-batch-size", "4"]
    result = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def corpus_of(folder):
    """Some files of the standard library in the place where the script looks for its corpus."""
    from megatron.gpt_oss.cli import main

    names = sorted(Path(json.__file__).parents[1].glob("[a-d]*.py"))
    main(["tokenize", *map(str, names), "--output", str(folder / "data" / "stdlib")])
    return folder / "data" / "stdlib"


def test_train_tiny_and_resume(tmp_path):
    (tmp_path / "data").mkdir()
    corpus = corpus_of(tmp_path)
    first = train(tmp_path, 4, corpus)
    assert f"starts from {tmp_path}/init" in first and "step 4/4" in first
    second = train(tmp_path, 6, corpus)
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
