# Copyright (c) 2026, the megatron-core gptoss authors.

"""A few layers of gpt-oss-20b at long context, trained over context parallel ranks.

    torchrun --nproc-per-node 2 benchmarks/context_parallel_model.py --json out.json
    torchrun --nproc-per-node 2 benchmarks/context_parallel_model.py --lengths 65536 --loss-chunk 0
    torchrun --nproc-per-node 2 benchmarks/context_parallel_model.py --smoke      (CPU, a minute)

Two parts. The check: the same weights and tokens at a length where one rank can hold the sequence
and its logits (two layers, 8k), once over all ranks by context parallelism, once with the whole
sequence on each rank; loss and gradient norm must agree to bf16's rounding. The run: real steps
(forward, backward, reduction, AdamW in fp32) in bf16 with the experts over the same ranks, one
model for all lengths; tokens/s, memory, loss. No length begins later than --limit.

The logits are what does not fit: 201088 x 6 bytes a token (bf16, and fp32 in the cross entropy).
--loss-chunk N passes N tokens at a time through head and loss, as --lm-loss-chunk-size does; every
token counts. --loss-chunk 0 is upstream's way. Before
anything is built, the table of what should lie in memory is printed; a length that cannot fit is
not tried, for the rank that runs out of memory would leave the others waiting.

Model FLOPs: 6 a parameter and token outside attention, 12 x seen query-key pairs x heads x head dim
in it; recomputation is not counted.
"""

import argparse
import gc
import json
import logging
import os
import platform
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch

from megatron.core import device_utils, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.gpt_oss.layer_specs import model_config
from megatron.gpt_oss.presets import get_preset
from megatron.gpt_oss.training.lm_loss import chunked_loss_processor
from megatron.gpt_oss.training.step import loss_func

GB = 1e9
# bf16 has 3 digits; the mean over thousands of tokens is far better than one of them.
LOSS_LIMIT, NORM_LIMIT = 1e-3, 2e-2


def main() -> None:
    """Run check and measurement as the command line says; rank 0 prints and writes."""
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
        expected = expected_bytes(preset, length, report.ranks, args.loss_chunk, args.gradients)
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
                trainer = Trainer(preset, report.ranks, args)
            row.update(measure(trainer, length, args.steps))
        except torch.OutOfMemoryError as error:
            report.write("run", {**row, "out_of_memory": str(error).split(". ")[0]})
            os._exit(1)  # the others wait in a collective: torchrun ends them
        report.add("run", row)
    report.print(f"{time.perf_counter() - begin:.0f} s in all")
    torch.distributed.destroy_process_group()
    if args.check_length and not report.data["check"][0]["equal"]:
        raise SystemExit("the check failed")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
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
    """What rank 0 prints, and the JSON file, whole after every row."""

    def __init__(self, args: argparse.Namespace):
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.path = Path(args.json) if args.json else None
        gpu = torch.cuda.get_device_name() if device_utils.is_cuda() else platform.machine()
        self.data = {
            "machine": {"torch": torch.__version__, "device": gpu, "ranks": self.ranks},
            "command": " ".join(sys.argv),
            "arguments": vars(args),
        }
        self.print(" ".join(f"{name}={value}" for name, value in self.data["machine"].items()))

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def add(self, part: str, row: dict) -> None:
        """A row that every rank has."""
        self.data.setdefault(part, []).append(row)
        if self.rank == 0:
            self._show_and_write(part, row)

    def write(self, part: str, row: dict) -> None:
        """A row of this rank alone."""
        self.data.setdefault(part, []).append({**row, "rank": self.rank})
        self._show_and_write(part, row)

    def _show_and_write(self, part: str, row: dict) -> None:
        values = {k: v for k, v in row.items() if not isinstance(v, dict)}
        print(f"{part}: " + ", ".join(f"{k} {rounded(v)}" for k, v in values.items()), flush=True)
        if self.path is not None:
            temporary = self.path.with_suffix(f".{self.rank}")
            temporary.write_text(json.dumps(self.data, indent=1) + "\n")
            temporary.replace(self.path)


def rounded(value):
    if isinstance(value, list):
        return "[" + " ".join(map(str, map(rounded, value))) + "]"
    return f"{value:.5g}" if isinstance(value, float) else value


def shown(parts: dict) -> str:
    """Bytes in GB, and their sum."""
    text = ", ".join(f"{name} {value / GB:.1f}" for name, value in parts.items())
    return f"{text}; in all {sum(parts.values()) / GB:.1f}"


def expected_bytes(preset, length: int, ranks: int, loss_chunk: int, gradients: str) -> dict:
    """What should lie in a rank's memory at the peak, in bytes; experts are split over all ranks.

    The last entry is the larger of two peaks that do not meet: head and loss, and one layer's
    backward.
    """
    h, width = preset.hidden_size, preset.moe_ffn_hidden_size
    q = preset.num_attention_heads * preset.head_dim
    kv = 2 * preset.num_query_groups * preset.head_dim
    expert = preset.num_experts * 3 * h * width / ranks * preset.num_layers
    dense = 2 * preset.vocab_size * h + preset.num_layers * h * (2 * q + kv)
    tokens = length / ranks
    logit_tokens = min(loss_chunk or tokens, tokens)
    routed = tokens * preset.num_experts_per_tok
    # Two bf16 tensors of the width and six of gate and up, in and after the activation, a row.
    head = 6 * logit_tokens * preset.vocab_size
    head += 4 * preset.vocab_size * h if loss_chunk else 0  # its gradient, in fp32
    layer = routed * 2 * (2 * h + 6 * 2 * width) + tokens * 2 * (6 * h + 3 * (q + kv))
    return {
        "parameters": 2 * (expert + dense),
        "gradients": (4 if gradients == "fp32" else 2) * (expert + dense),
        "optimizer": 12 * (expert + dense / ranks),
        "layer inputs": 2 * tokens * h * (preset.num_layers + 2),
        "head or a layer": max(head, layer),
    }


def free_bytes() -> float:
    """Memory of the device that is free now; without bound on the CPU."""
    return torch.cuda.mem_get_info()[0] if device_utils.is_cuda() else float("inf")


def model_flops(preset, length: int) -> float:
    """Forward and backward of one sequence, over all ranks."""
    h, heads = preset.hidden_size, preset.num_attention_heads * preset.head_dim
    groups = preset.num_query_groups * preset.head_dim
    layer = h * (2 * heads + 2 * groups)
    layer += preset.num_experts_per_tok * 3 * h * preset.moe_ffn_hidden_size
    dense = 6 * length * (preset.num_layers * layer + preset.vocab_size * h)
    window = min(preset.sliding_window, length)
    windowed = window * length - window * (window - 1) / 2
    full = length * (length + 1) / 2
    pairs = (preset.num_layers + 1) // 2 * windowed + preset.num_layers // 2 * full
    return dense + 12 * pairs * heads


class Trainer:
    """A model and its optimizer, over the ranks by context parallelism or not."""

    def __init__(self, preset, cp: int, args, optimizer: bool = True):
        ranks = torch.distributed.get_world_size()
        self.preset, self.loss_chunk = preset, args.loss_chunk
        layout = dict(context_parallel_size=cp, expert_model_parallel_size=ranks)
        parallel_state.initialize_model_parallel(**layout, expert_tensor_parallel_size=1)
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
        torch.manual_seed(1234)
        config = model_config(
            preset,
            **layout,
            expert_tensor_parallel_size=1,
            seq_length=max(args.check_length, *args.lengths),
            cp_comm_type=[args.cp_comm_type],
            bf16=not args.smoke,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
        )
        config.finalize()
        self.model = config.get_builder_cls()(config).build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(),
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=args.gradients == "fp32", use_distributed_optimizer=optimizer
            ),
            data_parallel_random_init=False,
            **({"mixed_precision_wrapper": None} if args.smoke else {}),
        )
        self.transformer = config.transformer
        self.transformer.finalize_model_grads_func = finalize_model_grads
        self.optimizer = None
        if optimizer:
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=1e-4,
                    weight_decay=0.1,
                    clip_grad=1.0,
                    bf16=not args.smoke,
                    params_dtype=torch.float32 if args.smoke else torch.bfloat16,
                    use_distributed_optimizer=True,
                ),
                self.model,
            )
            self.transformer.grad_scale_func = self.optimizer.scale_loss

    def forward_backward(self, length: int) -> float:
        """Gradients of a sequence; returns the mean loss of its tokens."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter([make_batch(self.preset.vocab_size, length)]),
            model=self.model,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=1,
            forward_only=False,
        )
        total = reports[0]["lm loss"].double()
        torch.distributed.all_reduce(total)
        return (total[0] / total[1]).item()

    def _forward_step(self, data, model):
        group = parallel_state.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(next(data), is_hybrid_cp=False, cp_group=group)
        options = {}
        if self.loss_chunk:
            options["output_processor"] = chunked_loss_processor(self.loss_chunk)
        losses = model(
            batch["tokens"],
            None,
            None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            **options,
        )
        return losses, partial(loss_func, batch["loss_mask"], cp_group=group)

    def gradient_norm(self) -> float:
        """Of all parameters, each once, after the reduction."""
        square = torch.zeros(2, dtype=torch.float64, device=device_utils.current_device())
        for parameter in self.model[0].parameters():
            of_expert = not getattr(parameter, "allreduce", True)
            square[int(of_expert)] += parameter.main_grad.norm().double() ** 2
        torch.distributed.all_reduce(square[1])  # each rank has its own experts
        return square.sum().sqrt().item()

    def close(self) -> None:
        """Give memory and process groups back."""
        self.model = self.optimizer = self.transformer = None
        gc.collect()
        parallel_state.destroy_model_parallel()
        if device_utils.is_cuda():
            torch.cuda.empty_cache()


def make_batch(vocab_size: int, length: int) -> dict:
    """One sequence, the same on every rank: few tokens are frequent, so that there is to learn."""
    generator = torch.Generator().manual_seed(7)
    tokens = (vocab_size * torch.rand(1, length + 1, generator=generator) ** 4).long()
    device = device_utils.current_device()
    return {
        "tokens": tokens[:, :-1].contiguous().to(device),
        "labels": tokens[:, 1:].contiguous().to(device),
        "loss_mask": torch.ones(1, length, device=device),
    }


def check(args) -> dict:
    """Loss and gradient norm with the sequence split and with the whole of it on every rank."""
    preset, ranks = get_preset(args.preset, 2), torch.distributed.get_world_size()
    found, weights = {}, None
    for cp in (ranks, 1):
        trainer = Trainer(preset, cp, args, optimizer=False)
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
        found[cp] = (trainer.forward_backward(args.check_length), trainer.gradient_norm())
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
    """Steps of training: loss and time of each, tokens/s of a rank, memory at the peak."""
    if device_utils.is_cuda():
        torch.cuda.reset_peak_memory_stats()
    ranks = torch.distributed.get_world_size()
    losses, norms, seconds = [], [], []
    for _ in range(steps):
        torch.distributed.barrier()
        begin = time.perf_counter()
        losses.append(trainer.forward_backward(length))  # reads the loss: waits for the device
        updated, norm, _ = trainer.optimizer.step()
        assert updated
        norms.append(float(norm))
        if device_utils.is_cuda():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    best = sorted(seconds[1:])[len(seconds[1:]) // 2]
    peak = torch.cuda.max_memory_allocated() if device_utils.is_cuda() else 0
    peaks = torch.tensor([peak], dtype=torch.float64, device=device_utils.current_device())
    torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
    return {
        "layers": trainer.preset.num_layers,
        "losses": losses,
        "grad_norms": norms,
        "seconds": seconds,
        "step_seconds": best,
        "tokens_per_second_per_rank": length / best / ranks,
        "tflops_per_rank": model_flops(trainer.preset, length) / best / ranks / 1e12,
        "peak_gb": peaks.item() / GB,
    }


if __name__ == "__main__":
    main()
