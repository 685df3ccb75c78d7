# Copyright (c) 2026, the megatron-core gptoss authors.
"""Does group cpu/ change anything on CUDA? Upstream's tree against upstream + cpu/, in turn, on one card.

    python benchmarks/cuda_unchanged.py --json benchmarks/results/cuda_unchanged.json

Each run trains upstream's own GPT on mock data in bf16 with the distributed optimizer. The losses of all steps are
compared bit for bit. Step times are upstream's own figures, one per five steps, the first ten steps left out: the
least (undisturbed) and the median over all runs of a tree. The trees take turns, and turns in going first.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

MODELS = {
    "dense": "",
    "moe": "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type none --moe-ffn-hidden-size 1024",
}
FLAGS = """
    --num-layers 4 --hidden-size 1024 --num-attention-heads 16 --group-query-attention --num-query-groups 4
    --seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 4 --global-batch-size 8 --train-iters 60
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --no-rope-fusion --transformer-impl local --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --attention-softmax-in-fp32
    --hidden-dropout 0 --attention-dropout 0 --bf16 --use-distributed-optimizer --lr 1e-3 --eval-iters 0
    --eval-interval 1000 --log-interval 5 --mock-data --tokenizer-type NullTokenizer --vocab-size 8191
"""


def worker(flags: list[str]) -> None:
    """Train in this process, with whatever `megatron` is first on the path; print the losses."""
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
    losses = []

    def loss_func(output):
        loss, count = output.float().sum(), torch.tensor(output.numel(), device=output.device)
        losses.append((loss / count).detach())
        report = torch.stack([loss.detach(), count.float()])
        return loss, count.int(), {"lm loss": report}

    def forward_step(iterator, model):
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


def make_trees(folder: Path) -> dict[str, Path]:
    """Upstream as released, and with group cpu/ and the modules that it needs."""
    from zipfile import ZipFile

    from patch_queue.materialise import Workspace
    from patch_queue.target import apply_to
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


def run(tree: Path, model: str) -> dict:
    """One training in a process of its own."""
    environ = {**os.environ, "PYTHONPATH": str(tree), "RANK": "0", "WORLD_SIZE": "1"}
    environ.update(LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29591")
    command = [sys.executable, "-W", "ignore", __file__, "--worker", *FLAGS.split()]
    command += MODELS[model].split()
    result = subprocess.run(command, env=environ, cwd=tree, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout[-3000:] + result.stderr[-3000:])
    times = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", result.stdout)
    (losses,) = re.findall(r"^LOSSES (.*)$", result.stdout, flags=re.M)
    return {"losses": losses.split(), "ms": [float(time) for time in times]}


def main() -> None:
    """Run both trees in turn and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import torch

    card = torch.cuda.get_device_name()
    machine = f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    print(machine, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        trees = make_trees(Path(tmp))
        for model in args.models:
            runs = {name: [] for name in trees}
            for repeat in range(args.repeats):
                for name in sorted(trees, reverse=bool(repeat % 2)):
                    runs[name].append(run(trees[name], model))
            all_losses = [one["losses"] for name in trees for one in runs[name]]
            row = {
                "model": model,
                "steps": len(all_losses[0]) // 2,
                "losses_bit_identical": all(losses == all_losses[0] for losses in all_losses),
                "last_loss": float.fromhex(all_losses[0][-1]),
            }
            for name in trees:
                times = [one["ms"][2:] for one in runs[name]]
                row[f"{name}_ms_least"] = min(map(min, times))
                row[f"{name}_ms_median"] = statistics.median(sum(times, []))
                row[f"{name}_ms"] = times
            rows.append(row)
    print("                                    upstream ms       cpu/ ms")
    print("model  steps identical last loss   least  median   least  median")
    for row in rows:
        times = (row[f"{tree}_ms_{what}"] for tree in trees for what in ("least", "median"))
        print(
            f"{row['model']:<6} {row['steps']:>5} {str(row['losses_bit_identical']):>9} "
            f"{row['last_loss']:>9.4f} " + " ".join(f"{time:7.1f}" for time in times)
        )
    if args.json:
        command = "python benchmarks/cuda_unchanged.py " + " ".join(sys.argv[1:])
        result = {"machine": machine, "command": command, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(sys.argv[sys.argv.index("--worker") + 1 :])
    else:
        main()
