# Copyright (c) 2026, the megatron-core gptoss authors.

"""A few layers of gpt-oss-20b at long context, trained with context parallelism.

    torchrun --nproc-per-node 2 -m benchmarks.training.context_parallel_model --json out.json
    torchrun --nproc-per-node 2 -m benchmarks.training.context_parallel_model --lengths 65536 --loss-chunk 0
    torchrun --nproc-per-node 2 -m benchmarks.training.context_parallel_model --smoke      (CPU, a minute)

The check: the same weights and tokens (two layers, 8k, so that one rank can hold the sequence and
its logits), once with context parallelism over all ranks, once with the complete sequence on each
rank; loss and gradient norm must agree within bf16 rounding. The run: training steps (forward,
backward, reduction, AdamW in fp32) in bf16 with the experts over the same ranks, one model for all
lengths; tokens/s, memory, loss. No length begins after --limit.

--loss-chunk N passes N tokens at a time through head and loss, as --lm-loss-chunk-size does. With
--loss-chunk 0, as in upstream, all logits take 201088 x 6 bytes per token (bf16, and fp32 in the
cross entropy). The planned memory is printed before the model is built; a length that does not fit is
skipped, because the other ranks would wait for a rank that runs out of memory. The routed tokens of
each rank's experts are counted on the device in every step: `expert_load` is the load imbalance, and
`expected_at_load` the planned memory with it.

Model FLOPs: 6 per parameter and token outside attention, 12 x visible query-key pairs x heads x head
dim in it; recomputation is not counted.
"""

import argparse
import logging
import os
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch

from benchmarks.lib import report as results
from benchmarks.lib.flops import model_flops
from benchmarks.lib.harness import Trainer, make_batch
from megatron.core import device_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.gpt_oss.planner.layout import Layout, Recompute
from megatron.gpt_oss.planner.memory import PHASE_NAMES, peak_rank_memory
from megatron.gpt_oss.presets import get_preset
from megatron.gpt_oss.training.metrics.router_load import ep_load_imbalance

GB = 1e9
# bf16 has 3 digits; the mean over thousands of tokens is far better than one of them.
LOSS_LIMIT, NORM_LIMIT = 1e-3, 2e-2


def main() -> None:
    """Run check and measurement; rank 0 prints and writes."""
    begin = time.perf_counter()
    args = parse_arguments()
    if device_utils.is_cuda():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(
        device_utils.default_backend(), timeout=timedelta(seconds=120)
    )
    report = Report(args)
    if args.check_length:
        report.add("check", check(args))
    preset = get_preset(args.preset, args.layers)
    memory = free_bytes()
    trainer = None
    for length in args.lengths:
        layout = layout_of(preset, length, report.ranks, args.loss_chunk, args.gradients)
        expected = expected_bytes(layout)
        row = {"length": length, "expected": expected}
        report.print(f"{length} tokens, expected GB: {shown(expected)}; free {memory / GB:.1f}")
        if sum(expected.values()) > memory:
            report.add("run", {**row, "not_run": "would not fit"})
            continue
        spent = torch.tensor(time.perf_counter() - begin, device=device_utils.current_device())
        torch.distributed.broadcast(spent, 0)
        if spent > args.limit:
            report.add("run", {**row, "not_run": f"{spent:.0f} s of --limit {args.limit:.0f}"})
            continue
        try:
            if trainer is None:
                trainer = trainer_of(preset, report.ranks, args)
            row.update(measure(trainer, length, args.steps))
        except torch.OutOfMemoryError as error:
            report.write("run", {**row, "out_of_memory": str(error).split(". ")[0]})
            os._exit(1)  # the others wait in a collective: torchrun ends them
        loaded = expected_bytes(replace(layout, expert_load=row["expert_load"]))
        row["expected_at_load"] = loaded
        report.print(f"expected GB with expert load {row['expert_load']:.2f}: {shown(loaded)}")
        report.add("run", row)
    report.print(f"{time.perf_counter() - begin:.0f} s in all")
    torch.distributed.destroy_process_group()
    if args.check_length and not report.data["check"][0]["equal"]:
        raise SystemExit("the check failed")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="20b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--cp-comm-type", default="auto")
    parser.add_argument("--loss-chunk", type=int, default=2048, help="tokens; 0: all at once")
    parser.add_argument("--steps", type=int, default=4, help="the first is not timed")
    parser.add_argument("--check-length", type=int, default=8192, help="0: no check")
    parser.add_argument("--gradients", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--limit", type=float, default=150, help="seconds")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for the CPU")
    args = parser.parse_args()
    if args.smoke:
        args.preset, args.lengths, args.check_length = "tiny", [96, 256], 128
        args.loss_chunk = min(args.loss_chunk, 48)
        args.steps = 2
    return args


class Report:
    """Output of rank 0; the JSON file is complete after every row."""

    def __init__(self, args: argparse.Namespace):
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.path = Path(args.json) if args.json else None
        self.facts = {**results.machine("torch", "triton"), "ranks": self.ranks}
        if device_utils.is_cuda():
            self.facts["gpu"] = torch.cuda.get_device_name()
        self.data = {"arguments": {k: v for k, v in vars(args).items() if k != "json"}}
        self.print(" ".join(f"{name}={value}" for name, value in self.facts.items()))

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def add(self, part: str, row: dict) -> None:
        """Add a row that is the same on every rank."""
        self.data.setdefault(part, []).append(row)
        if self.rank == 0:
            self._show_and_write(part, row)

    def write(self, part: str, row: dict) -> None:
        """Add a row of this rank."""
        self.data.setdefault(part, []).append({**row, "rank": self.rank})
        self._show_and_write(part, row)

    def _show_and_write(self, part: str, row: dict) -> None:
        values = {k: v for k, v in row.items() if not isinstance(v, dict)}
        print(f"{part}: " + ", ".join(f"{k} {rounded(v)}" for k, v in values.items()), flush=True)
        if self.path is not None:
            launcher = ["torchrun", f"--nproc-per-node {self.ranks}"]
            results.write_json(self.path, self.facts, launcher, **self.data)


def rounded(value):
    if isinstance(value, list):
        return "[" + " ".join(map(str, map(rounded, value))) + "]"
    return f"{value:.5g}" if isinstance(value, float) else value


def shown(parts: dict) -> str:
    """Format bytes and their sum in GB."""
    text = ", ".join(f"{name} {value / GB:.1f}" for name, value in parts.items())
    return f"{text}; in all {sum(parts.values()) / GB:.1f}"


def layout_of(preset, length: int, ranks: int, loss_chunk: int, gradients: str) -> Layout:
    """The layout of the run for the planner."""
    return Layout(
        preset,
        ranks,
        cp=ranks,
        ep=ranks,
        seq_length=length,
        recompute=Recompute.from_policy("lean"),
        loss_chunk=loss_chunk,
        grad_bytes=4 if gradients == "fp32" else 2,
    )


def expected_bytes(layout: Layout) -> dict:
    """Planned bytes of a rank at the peak."""
    memory = peak_rank_memory(layout)
    return {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        PHASE_NAMES[memory.peak_phase]: getattr(memory.phases, memory.peak_phase).total,
    }


class RoutedRows:
    """Counts the routed tokens of every expert in every forward, without synchronization."""

    def __init__(self, model):
        self.counts: list[torch.Tensor] = []  # [experts] of one layer, this rank's tokens
        self.hooks = [
            module.register_forward_hook(self._count)
            for module in model.modules()
            if isinstance(module, TopKRouter)
        ]

    def _count(self, router, inputs, output) -> None:
        self.counts.append(output[1].sum(0))  # of the routing map, [tokens, experts]

    def busiest(self) -> float:
        """Load imbalance: the maximum over layers and steps."""
        counts = torch.stack(self.counts)
        torch.distributed.all_reduce(counts)
        return load_of(counts, torch.distributed.get_world_size())

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def load_of(counts: torch.Tensor, ranks: int) -> float:
    """Load imbalance of counts [forwards, experts]: the most loaded rank over the mean."""
    return ep_load_imbalance(counts.double(), ranks).max().item()


def free_bytes() -> float:
    """Free memory of the device; infinite on the CPU."""
    return torch.cuda.mem_get_info()[0] if device_utils.is_cuda() else float("inf")


def trainer_of(preset, cp: int, args, optimizer: bool = True) -> Trainer:
    """A model with or without context parallelism; its experts are distributed over all ranks."""
    return Trainer(
        preset,
        cp=cp,
        ep=torch.distributed.get_world_size(),
        loss_chunk=args.loss_chunk,
        gradients=args.gradients,
        optimizer=optimizer,
        bf16=not args.smoke,
        seq_length=max(args.check_length, *args.lengths),
        cp_comm_type=[args.cp_comm_type],
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )


def mean_loss(trainer: Trainer, length: int) -> float:
    """Compute the gradients of a sequence; returns the mean loss of its tokens."""
    trainer.zero_gradients()
    report = trainer.forward_backward(make_batch(trainer.preset.vocab_size, length))
    total = report.double()
    torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


def gradient_norm(trainer: Trainer) -> float:
    """Gradient norm over all parameters after the reduction."""
    square = torch.zeros(2, dtype=torch.float64, device=device_utils.current_device())
    for parameter in trainer.model[0].parameters():
        of_expert = not getattr(parameter, "allreduce", True)
        square[int(of_expert)] += parameter.main_grad.norm().double() ** 2
    torch.distributed.all_reduce(square[1])  # each rank has its own experts
    return square.sum().sqrt().item()


def check(args) -> dict:
    """Compare loss and gradient norm with a split sequence and with the complete one on every rank."""
    preset, ranks = get_preset(args.preset, 2), torch.distributed.get_world_size()
    found, weights = {}, None
    for cp in (ranks, 1):
        trainer = trainer_of(preset, cp, args, optimizer=False)
        if cp == 1:
            trainer.loss_chunk = 0
        parameters = dict(trainer.model[0].named_parameters())
        if weights is None:
            weights = {name: value.detach().clone() for name, value in parameters.items()}
        else:  # drawn alike; copied all the same
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(weights[name])
        del parameters
        found[cp] = (mean_loss(trainer, args.check_length), gradient_norm(trainer))
        trainer.close()
    (loss, norm), (loss_one, norm_one) = found[ranks], found[1]
    errors = abs(loss / loss_one - 1), abs(norm / norm_one - 1)
    return {
        "length": args.check_length,
        "layers": preset.num_layers,
        "loss": loss,
        "loss_cp1": loss_one,
        "grad_norm": norm,
        "grad_norm_cp1": norm_one,
        "loss_error": errors[0],
        "grad_norm_error": errors[1],
        "equal": errors[0] < LOSS_LIMIT and errors[1] < NORM_LIMIT,
    }


def measure(trainer: Trainer, length: int, steps: int) -> dict:
    """Train: loss and time of each step, tokens/s per rank, peak memory."""
    if device_utils.is_cuda():
        torch.cuda.reset_peak_memory_stats()
    ranks = torch.distributed.get_world_size()
    losses, norms, seconds = [], [], []
    routed = RoutedRows(trainer.model[0])
    for _ in range(steps):
        torch.distributed.barrier()
        begin = time.perf_counter()
        losses.append(mean_loss(trainer, length))  # reads the loss: waits for the device
        norms.append(trainer.update())
        if device_utils.is_cuda():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    best = sorted(seconds[1:])[len(seconds[1:]) // 2]
    peak = torch.cuda.max_memory_allocated() if device_utils.is_cuda() else 0
    peaks = torch.tensor([peak], dtype=torch.float64, device=device_utils.current_device())
    torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
    routed.close()
    return {
        "layers": trainer.preset.num_layers,
        "losses": losses,
        "grad_norms": norms,
        "seconds": seconds,
        "step_seconds": best,
        "tokens_per_second_per_rank": length / best / ranks,
        "tflops_per_rank": model_flops(trainer.preset, length) / best / ranks / 1e12,
        "peak_gb": peaks.item() / GB,
        "expert_load": routed.busiest(),
    }


if __name__ == "__main__":
    main()
