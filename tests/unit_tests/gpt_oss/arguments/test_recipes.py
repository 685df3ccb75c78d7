# Copyright (c) 2026, the megatron-core gptoss authors.

"""examples/gpt_oss: every recipe through Megatron's checks and the planner; the launchers' commands."""

import functools
import importlib.util
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks.lib import report
from megatron.gpt_oss.arguments.recipe import read_recipe
from megatron.gpt_oss.arguments.validate_run import check_run_arguments
from megatron.gpt_oss.presets import get_preset

ROOT = Path(__file__).resolve().parents[4]
FOLDER = ROOT / "examples" / "gpt_oss"
FILES = sorted((FOLDER / "recipes").glob("*gpus.txt"))
# A step's, by model.
TOKENS = {20: 2**21, 120: 2**22}


@functools.cache
def script():
    """table.py, each of whose recipes is then parsed once for all tests."""
    specification = importlib.util.spec_from_file_location("recipes_table", FOLDER / "table.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.arguments = functools.cache(module.arguments)
    return module


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe(file):
    """Megatron accepts it on its GPUs; it is what its name says; it divides; it fits 80 GB."""
    billions, length, gpus = script().sizes(file)
    args = script().arguments(file)
    check_run_arguments(args)
    preset = get_preset(f"{billions}b")
    assert (args.preset, args.seq_length, args.world_size) == (preset.name, length, gpus)
    tp, cp, pp = (
        getattr(args, f"{kind}_parallel_size")
        for kind in ("tensor_model", "context", "pipeline_model")
    )
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    # Written independently of the planner, whose unsupported_reason() is checked below.
    for size, whole in (
        (tp * cp * pp, gpus),
        (etp * ep * pp, gpus),
        (ep, preset.num_experts),
        (tp, preset.num_query_groups),
        (pp, preset.num_layers),
        (math.lcm(2 * cp, cp * tp), length),
        (args.micro_batch_size * gpus // (tp * cp * pp), args.global_batch_size),
    ):
        assert whole % size == 0
    assert etp * ep == 8 and tp <= 8  # experts and tensor parallelism stay in a machine
    assert args.global_batch_size * length == TOKENS[billions]
    even, imbalanced = script().plan(args), script().plan(args, script().IMBALANCE)
    assert even.layout.unsupported_reason() is None
    assert even.fits and imbalanced.fits
    # CUDA and NCCL take 3 to 8 GB, of which 4.9 GB are what an 80 GB card has above 80 GB.
    assert 80e9 - imbalanced.memory.total > 4e9
    assert even.layout.offload == 0


def test_which_there_are():
    """Every length and number of GPUs but those that do not fit: 120b below 32 GPUs."""
    found = {script().sizes(file) for file in FILES}
    lengths = (8192, 32768, 131072)
    expected = {(20, length, gpus) for length in lengths for gpus in (8, 16, 32, 64)}
    expected |= {(120, length, gpus) for length in lengths for gpus in (32, 64)}
    assert found == expected
    assert script().recipes() == sorted(FILES, key=script().sizes)


def test_why_there_is_no_120b_on_16():
    """As the README says: the state does not fit on the GPUs, but with CPU offload it does."""
    from megatron.gpt_oss.planner.layout import Layout
    from megatron.gpt_oss.planner.search import PlanRequest, all_plans

    layout = Layout(get_preset("120b"), 16, seq_length=8192, global_batch_size=512)
    assert not any(plan.fits for plan in all_plans(PlanRequest(layout, 80e9, offload=False)))
    fitting = [plan for plan in all_plans(PlanRequest(layout, 80e9)) if plan.fits]
    assert fitting and min(plan.memory.cpu_memory for plan in fitting) > 85e9


def test_reference_case():
    """32k, context parallel 4, expert parallel 8, on eight GPUs."""
    args = script().arguments(FOLDER / "recipes" / "20b-32k-8gpus.txt")
    assert (args.context_parallel_size, args.expert_model_parallel_size) == (4, 8)
    assert (args.world_size, args.data_parallel_size, args.seq_length) == (8, 2, 32768)


@pytest.mark.parametrize(
    "name, fp8",
    [
        ("te-bf16", (None, "delayed")),
        ("te-fp8-current", ("hybrid", "tensorwise")),
        ("te-fp8-blockwise", ("e4m3", "blockwise")),
    ],
)
def test_transformer_engine(name, fp8):
    """The reference case again, with nothing changed but whose layers run it."""
    file = FOLDER / "recipes" / "20b-32k-8gpus.txt"
    args = script().arguments(file.with_name(f"{file.stem}-{name}.txt"), gpus=8)
    check_run_arguments(args)
    assert (args.transformer_impl, args.sink_attention) == ("transformer_engine", "megatron")
    assert (args.fp8, args.fp8_recipe) == fp8 and args.bf16 and args.moe_grouped_gemm
    reference = script().arguments(file)
    for dest in ("context_parallel_size", "global_batch_size", "cp_comm_type", "lr"):
        assert getattr(args, dest) == getattr(reference, dest)


@pytest.mark.parametrize("name", ["20b-8k-8", "20b-32k-8", "120b-8k-32", "120b-32k-32"])
def test_fine_tuning(name):
    """The layout of the pre-training recipe, with half a million tokens per step."""
    file = FOLDER / "recipes" / f"{name}gpus-sft.txt"
    reference = script().arguments(file.with_name(f"{name}gpus.txt"))
    args = script().arguments(file, gpus=reference.world_size)
    check_run_arguments(args)
    assert args.sft and args.calculate_per_token_loss and args.dataloader_inter_document_masking
    assert args.moe_router_load_balancing_type == "none" and args.moe_aux_loss_coeff == 0
    assert args.global_batch_size * args.seq_length == 2**19 and args.lr < reference.lr
    for dest in ("context_parallel_size", "pipeline_model_parallel_size", "recompute_granularity"):
        assert getattr(args, dest) == getattr(reference, dest)


def test_training_choices_are_those_of_one_file():
    """A recipe says model, length, layout and what goes with the size; the rest stands once."""
    common = read_recipe(FOLDER / "recipes" / "continual.txt")
    flags = {word for word in common if word.startswith("--")}
    for file in FILES:
        own = read_recipe(file)
        assert own[:2] == ["--recipe", "continual.txt"]
        assert not flags & set(own), file
    args = script().arguments(FILES[0])
    assert args.moe_router_load_balancing_type == "global_aux_loss"
    assert args.moe_aux_loss_coeff == 1e-4
    assert args.dataloader_inter_document_masking and args.eod_mask_loss
    assert args.lr_warmup_fraction == 0.02 and args.lr_decay_style == "cosine"


def test_command_line_wins():
    file = FOLDER / "recipes" / "20b-32k-8gpus.txt"
    args = script().arguments(file, "--lr", "3e-5", "--memory", "lean", "--train-iters", "50")
    assert (args.lr, args.train_iters, args.min_lr) == (3e-5, 50, 2e-6)
    assert args.recompute_granularity == "full"  # not the recipe's --memory experts
    assert args.recipe == [str(file)]


def test_table_is_current():
    found = report.read_section(script().PAGE, script().SECTION)
    assert found == script().table(), "python examples/gpt_oss/table.py --write"


def _run(*command, **environ):
    clean = {k: v for k, v in os.environ.items() if k not in ("GPUS", "NODES", "DRY", "SIF")}
    done = subprocess.run(
        list(map(str, command)),
        env={**clean, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_launcher():
    """DRY=1 prints what would be started."""
    launch = FOLDER / "launch.sh"
    recipe = FOLDER / "recipes" / "20b-32k-16gpus.txt"
    tail = f"{ROOT}/pretrain_gpt_oss.py --recipe"
    code, out, error = _run(launch, "20b-32k-8gpus", "--run-dir", "a b", DRY="1", GPUS="8")
    assert (code, error) == (0, "")
    assert shlex.split(out) == [
        *("gptoss launch --nproc-per-node 8 --standalone " + tail).split(),
        str(FOLDER / "recipes" / "20b-32k-8gpus.txt"),
        *("--run-dir", "a b"),
    ]
    two = {"DRY": "1", "GPUS": "8", "NODES": "2", "RENDEZVOUS": "host:29500", "JOB": "7"}
    code, out, error = _run(launch, recipe, **two)
    assert (code, error) == (0, "")
    rendezvous = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint host:29500 --rdzv-id 7"
    expected = f"gptoss launch --nproc-per-node 8 {rendezvous} {tail} {recipe}"
    assert shlex.split(out) == expected.split()
    code, out, error = _run(launch, "20b-32k-16gpus.txt", DRY="1", GPUS="4")
    assert code == 0 and "planned for 16 GPUs, this run has 4" in error


def test_launcher_refuses():
    launch = FOLDER / "launch.sh"
    for argv, environ, words in (
        ((), {}, ("no recipe", "20b-32k-8gpus")),
        (("21b",), {}, ("no recipe", "21b.txt", "20b-32k-8gpus")),
        (("20b-32k-8gpus",), {"GPUS": "0"}, ("GPUS=N",)),
        (("20b-32k-8gpus",), {"NODES": "2", "GPUS": "4"}, ("RENDEZVOUS", "HOST:PORT")),
    ):
        code, out, error = _run(launch, *argv, **{"DRY": "1", **environ})
        assert code != 0 and out == "" and all(word in error for word in words), error


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*"; fi',
    "scancel": 'echo "scancel $*"; touch "$FLAG"',
    # A step that ends by itself, or, for the second test, once scancel runs.
    "srun": (
        'echo "srun $NODES $RENDEZVOUS $JOB $GPUS $*"; [ -z "${LONG:-}" ] && exit 3\n'
        'kill -USR1 "$PPID"; until [ -f "$FLAG" ]; do sleep 0.05; done; echo saved; exit 1'
    ),
}


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for Slurm's commands on the PATH, and what Slurm tells a job."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FLAG": str(tmp_path / "cancelled"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "1234567",
        "SLURM_GPUS_ON_NODE": "8",
    }


def test_slurm_job(slurm):
    """The step's command, its status, and no new start for a run that ended by itself."""
    code, out, error = _run("bash", FOLDER / "slurm.sbatch", "20b-32k-16gpus", "--lr", "1", **slurm)
    step = "--kill-on-bad-exit=0 --wait=600 --cpu-bind=none"
    launch = f"bash {FOLDER}/launch.sh 20b-32k-16gpus --lr 1"
    assert out == f"srun 2 node7:24567 1234567 8 {step} {launch}\n", error
    assert code == 3
    _, out, _ = _run("bash", FOLDER / "slurm.sbatch", "x", SIF="a.sif", BIND="/data", **slurm)
    container = f"apptainer exec --nv --bind {ROOT},/data a.sif"
    assert f"{step} {container} /opt/gpt-oss/examples/gpt_oss/launch.sh x\n" in out


def test_slurm_time_limit(slurm):
    """USR1 goes to the ranks; the job is queued again once they have saved, and not before."""
    code, out, error = _run("bash", FOLDER / "slurm.sbatch", "20b-32k-16gpus", LONG="1", **slurm)
    assert code == 0, error
    lines = out.splitlines()[1:]
    assert lines == ["scancel --signal=USR1 1234567", "saved", "scontrol requeue 1234567"]


def test_scripts_are_bash_and_the_image_has_what_it_copies():
    for name in ("launch.sh", "slurm.sbatch"):
        assert _run("bash", "-n", FOLDER / name)[0] == 0
    text = (FOLDER / "slurm.sbatch").read_text()
    # The script traps the signal that it asks for, early enough for srun's --wait.
    name, seconds = re.search(r"#SBATCH --signal=B:(\w+)@(\d+)\n", text).groups()
    assert f"trap save_and_end {name}\n" in text
    assert int(seconds) > int(re.search(r"--wait=(\d+)", text)[1])
    # sbatch reads no further than the first command.
    assert text.rindex("#SBATCH") < text.index("\nset -")
    image = (FOLDER / "gpt_oss.def").read_text()
    copied = re.search(r"%files\n(.*?)\n\n", image, flags=re.S)[1].splitlines()
    sources = [line.split()[0] for line in copied]
    assert {"setup.py", "patches", "megatron", "examples"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
