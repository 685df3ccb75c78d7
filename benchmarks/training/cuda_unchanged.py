# Copyright (c) 2026, the megatron-core gptoss authors.
"""Does group cpu/ change anything on CUDA? Upstream's tree against upstream + cpu/, in turn, on one card.

    python -m benchmarks.training.cuda_unchanged --json benchmarks/results/cuda_unchanged.json

Each run trains upstream's own GPT on mock data in bf16 with the distributed optimizer. The losses of all steps are
compared bit for bit. Step times are upstream's own figures, one per five steps, the first ten steps left out: the
least (undisturbed) and the median over all runs of a tree. The trees take turns, and turns in going first. A tree is
imported once, by a server that forks a process for every run. Times of a host-bound step scatter by more than any
difference, so that one step is also profiled: the kernels it launches and its calls of the CUDA runtime, by name.
Needs a CUDA device and an environment in which upstream imports (Python >= 3.12, Triton).
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

MODELS = {
    "dense": "",
    "moe": "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type none --moe-ffn-hidden-size 1024",
}
FLAGS = """
    --num-layers 4 --hidden-size 1024 --num-attention-heads 16 --group-query-attention --num-query-groups 4
    --seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 4 --global-batch-size 8
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --no-rope-fusion --transformer-impl local --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --attention-softmax-in-fp32
    --hidden-dropout 0 --attention-dropout 0 --bf16 --use-distributed-optimizer --lr 1e-3 --eval-iters 0 --lr-decay-iters 60
    --eval-interval 1000 --log-interval 5 --mock-data --tokenizer-type NullTokenizer --vocab-size 8191
"""
MICRO_BATCHES = 2  # of a step: global batch 8 / micro batch 4
# How often these come depends on how long others take: NCCL's watchdog polls.
POLLING = ("cudaEventQuery", "cudaThreadExchangeStreamCaptureMode")
PROFILED = 7  # the step, counted from 0: in the two intervals that the times leave out


def serve() -> None:
    """Import whatever `megatron` is first on the path; fork a training for every line of flags."""
    import megatron.training  # noqa: F401  importing takes as long as the training

    print("READY", flush=True)
    for line in sys.stdin:
        child = os.fork()  # CUDA is not in use yet: it would not survive this
        if child == 0:
            try:
                train(line.split())
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        print("END", flush=True)


def train(flags: list[str]) -> None:
    """Train in this process; print the losses."""
    import torch

    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.enums import ModelType
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = [sys.argv[0], *flags]
    args = parse_and_validate_args()
    losses, profiles = [], []

    def loss_func(output):
        loss, count = output.float().sum(), torch.tensor(output.numel(), device=output.device)
        losses.append((loss / count).detach())
        report = torch.stack([loss.detach(), count.float()])
        return loss, count.int(), {"lm loss": report}

    def forward_step(iterator, model):
        if len(losses) == PROFILED * MICRO_BATCHES:
            profiles.append(start_profile())
        if len(losses) == (PROFILED + 1) * MICRO_BATCHES:
            print("COUNTS " + json.dumps(stop_profile(profiles.pop())), flush=True)
        sample = next(iterator)
        tokens, labels, positions = (
            sample[key].cuda() for key in ("tokens", "labels", "position_ids")
        )
        return model(tokens, positions, None, labels=labels), loss_func

    def datasets(num_samples, vp_stage=None):
        config = GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            split="100,0,0",
            tokenizer=build_tokenizer(args),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        builder = BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config)
        return builder.build()

    datasets.is_distributed = True
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
    print("LOSSES " + " ".join(float(loss).hex() for loss in losses), flush=True)


def start_profile():
    """Start to profile."""
    import torch

    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profile = torch.profiler.profile(activities=activities)
    profile.start()
    return profile


def stop_profile(profile) -> dict[str, dict[str, int]]:
    """Number of launches of each kernel, and of calls of each CUDA runtime function."""
    import torch

    torch.cuda.synchronize()
    profile.stop()
    counts = {"kernels": Counter(), "runtime": Counter()}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts["kernels"][event.name] += 1
        elif event.name.startswith("cuda") and event.name not in POLLING:
            counts["runtime"][event.name] += 1
    return counts


def make_trees(folder: Path) -> dict[str, Path]:
    """Upstream as released, and with group cpu/ and the modules that it needs."""
    from zipfile import ZipFile

    from patch_queue.foreign_tree import apply_to
    from patch_queue.materialise import Workspace
    from patch_queue.upstream import locate_wheel

    trees = {name: folder / name for name in ("upstream", "cpu")}
    for tree in trees.values():
        with ZipFile(locate_wheel(ROOT)) as archive:
            archive.extractall(tree)
        # The wheel holds no Makefile for its compiled helpers, and upstream runs make on every start.
        (tree / "megatron/core/datasets/Makefile").write_text("all:\n")
        for built in (ROOT / "megatron/core/datasets").glob("helpers_cpp*.so"):
            shutil.copy2(built, tree / "megatron/core/datasets")
    apply_to(ROOT, Workspace(ROOT).series, trees["cpu"], ["cpu"])
    return trees


class Server:
    """A process with one tree imported."""

    def __init__(self, tree: Path, port: int):
        environ = {**os.environ, "PYTHONPATH": str(tree), "RANK": "0", "WORLD_SIZE": "1"}
        environ.update(LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the CUDA runtime would not survive a fork
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve"],
            env=environ,
            cwd=tree,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def read_until(self, word: str) -> str:
        lines = []
        for line in self.process.stdout:
            if line.strip() == word:
                return "".join(lines)
            lines.append(line)
        sys.exit("".join(lines)[-3000:])

    def run(self, model: str, steps: int) -> dict:
        """One training: its losses, what the profiled step called, and the step times in ms."""
        flags = f"{FLAGS} {MODELS[model]} --train-iters {steps}"
        self.process.stdin.write(" ".join(flags.split()) + "\n")
        self.process.stdin.flush()
        output = self.read_until("END")
        times = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", output)
        losses = re.findall(r"^LOSSES (.*)$", output, flags=re.M)
        counts = re.findall(r"^COUNTS (.*)$", output, flags=re.M)
        if not losses or not counts:
            sys.exit(output[-3000:])
        return {
            "losses": losses[0].split(),
            "counts": json.loads(counts[0]),
            "ms": [float(time) for time in times],
        }


def compare(model: str, servers: dict[str, Server], repeats: int, steps: int) -> dict:
    """Run both trees alternately on one model; returns a row of the table."""
    runs = {name: [] for name in servers}
    for repeat in range(repeats):
        for name in sorted(servers, reverse=bool(repeat % 2)):
            runs[name].append(servers[name].run(model, steps))
            print(f"{model} {name}: {min(runs[name][-1]['ms'][2:]):.1f} ms at least", flush=True)
    all_losses = [one["losses"] for name in servers for one in runs[name]]
    row = {
        "model": model,
        "steps": steps,
        "losses_bit_identical": all(losses == all_losses[0] for losses in all_losses),
        "last_loss": float.fromhex(all_losses[0][-1]),
    }
    counts = {name: runs[name][0]["counts"] for name in servers}
    row["kernels_identical"] = counts["upstream"]["kernels"] == counts["cpu"]["kernels"]
    row["runtime_calls_identical"] = counts["upstream"]["runtime"] == counts["cpu"]["runtime"]
    for name in servers:
        row[f"{name}_kernels"] = sum(counts[name]["kernels"].values())
        row[f"{name}_runtime_calls"] = counts[name]["runtime"]
        times = [one["ms"][2:] for one in runs[name]]
        row[f"{name}_ms_least"] = min(map(min, times))
        row[f"{name}_ms_median"] = statistics.median(sum(times, []))
        row[f"{name}_ms"] = times
    return row


def main() -> None:
    """Compare, print a table, and write it after every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of a model on a tree")
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    args = parser.parse_args()
    import torch

    card = torch.cuda.get_device_name()
    machine = f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    command = "python -m benchmarks.training.cuda_unchanged " + " ".join(sys.argv[1:])
    print(machine, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        trees = make_trees(Path(tmp))
        servers = {name: Server(tree, 29591 + i) for i, (name, tree) in enumerate(trees.items())}
        for server in servers.values():
            server.read_until("READY")
        for model in args.models:
            rows.append(compare(model, servers, args.repeats, args.steps))
            if args.json:
                result = {"machine": machine, "command": command, "rows": rows}
                args.json.write_text(json.dumps(result, indent=1) + "\n")
        for server in servers.values():
            server.process.stdin.close()
            server.process.wait()
    print("             losses            kernels      same    upstream ms        cpu/ ms")
    print("model  steps identical   upstream    cpu/   calls   least  median   least  median")
    for row in rows:
        times = (row[f"{tree}_ms_{what}"] for tree in trees for what in ("least", "median"))
        print(
            f"{row['model']:<6} {row['steps']:>5} {str(row['losses_bit_identical']):>9} "
            f"{row['upstream_kernels']:>10} {row['cpu_kernels']:>7} "
            f"{str(row['kernels_identical'] and row['runtime_calls_identical']):>7} "
            + " ".join(f"{time:7.1f}" for time in times)
        )


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        main()
