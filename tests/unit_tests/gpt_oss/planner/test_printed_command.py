# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command that `gptoss plan` prints: its ranks, and a dry run of it that agrees with the plan."""

import contextlib
import io
import itertools
import json
import random
import re

import pytest

from megatron.gpt_oss import cli
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.planner import command as plan_command
from megatron.gpt_oss.planner.machines import Machines
from megatron.gpt_oss.planner.memory import GB, card_memory, default_reserve
from tests.harness.command_lines import dry_run, planned_command, torchrun_parts

GPUS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 17, 24, 48, 64, 96, 1000)
PER_MACHINE = (1, 2, 3, 4, 8)
MODELS = (
    "--preset tiny",
    "--preset tiny --preset-layers 6 --seq-length 1024",
    "--preset 20b --gpu-memory 141",
    "--preset 20b --preset-layers 4 --seq-length 262144 --memory lean",
    "--preset 20b --seq-length 393216 --gpu-memory 141 --memory lean --grad-reduce-in-bf16",
    "--preset 20b --preset-layers 3 --micro-batch-size 3 --global-batch-size 144",
    "--preset 120b --preset-layers 9 --seq-length 8192",
    "--preset 120b --memory lean --offload --gpu-memory 141",
)
ALL = list(itertools.product(MODELS, GPUS, PER_MACHINE))


def plan(flags):
    """What `gptoss plan` prints, and its refusal."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            cli.main(["plan", *flags.split()])
        except SystemExit as stop:
            assert stop.code == 2
    return out.getvalue(), error.getvalue()


def check(model, gpus, per_machine):
    """Refused in one sentence, or a command for exactly these ranks that needs what is planned."""
    flags = f"{model} --gpus {gpus} --gpus-per-machine {per_machine}"
    out, error = plan(f"{flags} --json")
    if error:
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return False
    found = json.loads(out)
    best = found["best"]
    # Of a GPU's memory, what is not tensors is left.
    card = card_memory(141 if "gpu-memory 141" in model else 80)
    assert best["memory"]["total"] <= card - default_reserve(gpus)
    machines, each, script, argv = torchrun_parts(planned_command(found["command"]))
    assert machines * each == gpus and each <= per_machine, found["command"]
    assert machines == -(-gpus // per_machine) and script == "pretrain_gpt_oss.py"
    layout = best["layout"]
    assert layout["global_batch_size"] % (layout["micro_batch_size"] * layout["dp"]) == 0
    text = dry_run(argv, f"{machines}x{each}")
    assert f"Peak: {best['memory']['total'] / GB:.2f} GB." in text
    assert re.search(rf"total +{best['seconds']['total']:.3f} s\n", text), (best, text)
    if best["optimizer_offload"]:
        need = best["cpu_memory_per_machine"]
        assert f"The optimizer takes {need / GB:.2f} GB of CPU memory per machine" in text
    return True


@pytest.fixture(autouse=True)
def unknown_cpu_memory(monkeypatch):
    """As on a machine without a GPU."""
    monkeypatch.setattr(plan_command, "has_gpu", lambda: False)


def test_sample():
    """Small searches of each model; `test_all` takes the rest."""
    cases = [(model, gpus, size) for model, gpus, size in ALL if gpus <= 12]
    chosen = random.Random(7).sample(cases, 10)
    chosen += [(MODELS[0], 1000, 8), (MODELS[4], 8, 8), (MODELS[5], 12, 8), (MODELS[5], 9, 3)]
    fitting = [case for case in chosen if check(*case)]
    assert len(fitting) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_all(model):
    fitting = [case for case in ALL if case[0] == model and check(*case)]
    assert len(fitting) >= 10


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("per_machine", PER_MACHINE)
def test_machines(gpus, per_machine):
    """As many ranks on each, all of them; or refused, with numbers that are not."""
    try:
        found = Machines.of(gpus, per_machine)
    except UsageError as error:
        assert gpus % -(-gpus // per_machine)
        numbers = re.search(r"Give --gpus (\d+) or (\d+)", str(error))
        for number in map(int, numbers.groups()):
            assert Machines.of(number, per_machine).ranks == number
        if other := re.search(r"--gpus-per-machine (\d+) for", str(error)):
            assert Machines.of(gpus, int(other[1])).idle == 0
        return
    assert found.ranks == gpus and found.gpus <= per_machine
    assert (found.gpus + found.idle == per_machine) or found.count == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--gpus 12", ("--nnodes 2 --nproc-per-node 6", "2 of each machine", "--dry-run 2x6")),
        ("--gpus 16 --gpus-per-machine 4", ("--nnodes 4 --nproc-per-node 4", "--dry-run 4x4")),
        ("--gpus 8", ("torchrun --nproc-per-node 8 pretrain_gpt_oss.py", "--dry-run 8 ")),
    ],
)
def test_told(flags, words):
    out, error = plan(f"--preset 20b --memory balanced {flags} --rows 1")
    assert not error and all(word in out for word in words), out
    assert ("--rdzv-endpoint" in out) == ("--nnodes" in out)


def test_cpu_memory():
    """A note if the CPU memory is not known, a check if it is."""
    flags = "--preset 20b --gpus 1 --gpu-memory 141"
    out, error = plan(flags)
    assert not error and "0 of 8 layouts fit, 4 more if a machine has enough CPU memory" in out
    assert (
        "takes 335 GB of CPU memory on each machine" in out
        and "not checked: give --host-memory" in out
    )
    assert "CPU?" in out and " yes " not in out
    assert json.loads(plan(f"{flags} --json")[0])["best"]["fits"] is None
    out, error = plan(f"{flags} --host-memory 512")
    assert not error and " yes " in out and "4 of 8 layouts fit." in out
    out, error = plan(f"{flags} --host-memory 256")
    assert "needs 335 GB of CPU memory per machine" in error and "256 GB" in error
    more = re.search(r"machines with (\d+) GB", error)[1]
    assert not plan(f"{flags} --host-memory {more}")[1]
    # All ranks of a machine share it.
    best = json.loads(plan("--preset 20b --gpus 2 --gpu-memory 141 --offload --json")[0])["best"]
    assert best["cpu_memory_per_machine"] == pytest.approx(16 * 20.9e9, rel=0.05)


def test_reserve():
    assert "--gpu-reserve" in plan("--preset 20b --gpus 8 --gpu-memory 8")[1]
    one = plan("--preset 20b --gpus 1 --gpu-memory 141")[0]
    assert "145.1 GB are for tensors, 5 for" in one
    assert "76.9 GB are for tensors, 8 for" in plan("--preset 20b --gpus 8 --memory lean")[0]
    own = plan("--preset 20b --gpus 8 --memory lean --gpu-reserve 2.9")[0]
    assert "82.0 GB are for tensors, 2.9 for" in own


@pytest.mark.parametrize("word", ["0", "-2", "2x", "x4", "2x0", "1e3", "2x4x2"])
def test_dry_run_refuses(word):
    with pytest.raises(UsageError, match=r"--dry-run.*expected a number of GPUs"):
        dry_run(["--preset", "tiny", "--dry-run", word])


def test_dry_run_needs_no_tokenizer(tmp_path):
    for preset in ("tiny", "20b", "120b"):
        assert f"{preset}, " in dry_run(["--preset", preset, "--bf16"], "1")
    with pytest.raises(UsageError, match="--tokenizer-model .*/none: no such file"):
        dry_run(["--preset", "tiny", "--tokenizer-model", str(tmp_path / "none")], "1")
