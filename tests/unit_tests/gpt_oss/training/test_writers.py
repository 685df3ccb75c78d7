# Copyright (c) 2026, the megatron-core gptoss authors.

"""Metrics in TensorBoard and Weights & Biases, and the message if a package is missing."""

import importlib.util
import sys

import pytest

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.metrics.writers import check_writers, flatten
from tests.harness import runs
from tests.harness.parser import flags

# A stand-in for the wandb package: it writes down what it is given.
FAKE_WANDB = """
import json, os
def init(**kwargs):
    global path
    path = os.path.join(kwargs["dir"], "calls.jsonl")
    write("init", name=kwargs["name"], project=kwargs["project"])
def write(call, **what):
    with open(path, "a") as file:
        file.write(json.dumps({"call": call, **what}) + "\\n")
def log(values, step=None):
    write("log", values={k: float(v) for k, v in values.items()}, step=step)
def finish(): write("finish")
def define_metric(*args, **kwargs): pass
class Artifact:
    def __init__(self, *args, **kwargs): pass
    def add_reference(self, *args, **kwargs): pass
    def add_file(self, *args, **kwargs): pass
class run:
    entity, project = "me", "tiny"
    log_artifact = staticmethod(lambda *args, **kwargs: None)
class config:
    update = staticmethod(lambda *args, **kwargs: None)
"""


def test_flatten():
    record = {"loss": 1.5, "mfu": None, "experts": {"load_cv": [0.5, 0.25]}, "text": "no number"}
    assert dict(flatten("train", record)) == {
        "train/loss": 1.5,
        "train/experts/load_cv/0": 0.5,
        "train/experts/load_cv/1": 0.25,
    }


@pytest.mark.parametrize(
    "argv, package, words",
    [
        ("--tensorboard-dir tb", "tensorboard", "needs TensorBoard, which is not installed"),
        ("--wandb-project p", "wandb", "--wandb-project p needs Weights & Biases"),
    ],
)
def test_missing_package(monkeypatch, argv, package, words):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=words):
        check_writers(flags(argv))
    assert check_writers(flags("--preset tiny")) == {}


def test_name_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    found = check_writers(flags(f"--wandb-project p --run-dir {tmp_path}/first"))
    assert found == {"wandb_exp_name": "first", "wandb_save_dir": str(tmp_path / "first/wandb")}
    with pytest.raises(UsageError, match="--wandb-exp-name, or --run-dir"):
        check_writers(flags("--wandb-project p"))


def main_with_wandb(argv, folder):
    sys.path.insert(0, folder)
    try:
        runs.main_in_rank(argv)
    finally:
        sys.path.remove(folder)
        sys.modules.pop("wandb", None)


def test_both_get_what_metrics_jsonl_gets(ranks, inputs, tmp_path):
    """On two pipeline stages, of which the last one writes."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE_WANDB)
    flags = (
        "--train-iters 2 --eval-interval 2 --monitor-interval 2 --pipeline-model-parallel-size 2 "
        f"--tensorboard-dir {tmp_path}/tb --wandb-project tiny"
    )
    argv = runs.command(inputs, tmp_path / "run", flags)
    folder = str(tmp_path / "site")
    ranks.run(main_with_wandb, argv, folder, world_size=2, init_process_group=False)
    records = runs.read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = runs.steps(records)
    validation = [record["valid_loss"] for record in records if "valid_loss" in record]

    board = events.EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    for name in ("loss", "grad_norm", "tokens_per_second_per_gpu", "tflops_per_gpu"):
        found = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert found == pytest.approx({step: steps[step][name] for step in steps}, rel=1e-6)
    assert board.Scalars("validation/valid_loss")[0].value == pytest.approx(validation[0], rel=1e-6)
    load = runs.only(records, "experts")[2]
    share = board.Scalars("experts/max_expert_share/1")[0]
    assert (share.step, share.value) == (2, pytest.approx(load["max_expert_share"][1], rel=1e-6))

    calls = runs.read_metrics(tmp_path / "run" / "wandb" / "calls.jsonl")
    assert calls[0] == {"call": "init", "name": "run", "project": "tiny"}
    assert calls[-1]["call"] == "finish"
    logged = [call for call in calls if call["call"] == "log"]
    losses = [c["values"]["train/loss"] for c in logged if "train/loss" in c["values"]]
    assert losses == [steps[1]["loss"], steps[2]["loss"]]
    norms = [c["values"] for c in logged if "norms/grad_norm/router" in c["values"]]
    assert (
        norms[0]["norms/grad_norm/router"] == runs.only(records, "norms")[2]["grad_norm"]["router"]
    )
