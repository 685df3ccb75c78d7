# Copyright (c) 2026, the megatron-core gptoss authors.

"""A run as the planner sees it: the model, the ranks, what is computed again."""

import math
from dataclasses import dataclass

from megatron.gpt_oss.arguments.flags import LM_LOSS_CHUNK_SIZE
from megatron.gpt_oss.arguments.recompute import POLICIES
from megatron.gpt_oss.presets import PRESETS, Preset


def loss_chunk_of(policy: str) -> int:
    """Tokens whose logits live at a time with a word of --memory."""
    return POLICIES[policy].get("lm_loss_chunk_size", LM_LOSS_CHUNK_SIZE)


@dataclass(frozen=True)
class Recompute:
    """Megatron's recompute flags: granularity None, 'selective' or 'full'."""

    granularity: str | None = None
    modules: tuple[str, ...] = ()
    method: str | None = None
    num_layers: int = 1

    @classmethod
    def of_policy(cls, name: str) -> "Recompute":
        """Of a word of --memory."""
        flags = POLICIES[name]
        return cls(
            flags.get("recompute_granularity"),
            tuple(flags.get("recompute_modules", ())),
            flags.get("recompute_method"),
            flags.get("recompute_num_layers", 1),
        )

    def makes_again(self, module: str) -> bool:
        """Whether a module of a layer is made again by itself."""
        return self.granularity == "selective" and module in self.modules


@dataclass(frozen=True)
class Layout:
    """One run.

    Args:
        preset: the model.
        gpus: ranks in all.
        tp, etp, ep, cp, pp: sizes of tensor, expert tensor, expert, context and pipeline
            parallelism; data parallelism takes what is left.
        virtual_stages: model chunks a pipeline rank (1: not interleaved).
        seq_length, micro_batch_size, global_batch_size: of the whole run.
        sequence_parallel: what lies between attention and experts is split over TP too.
        recompute: what is computed again.
        mlp_chunks: parts of the sequence that experts take one after the other.
        loss_chunk: tokens whose logits live at a time; 0: all.
        distributed_optimizer: its state is split over the data parallel ranks.
        offload: the part of the optimizer's state on the host, 0 to 1.
        grad_bytes: of an element of the gradient buffer.
        overlap: gradients and weights travel while layers compute.
        expert_load: rows of the busiest rank's experts over the mean.
        cp_comm_type: of full layers.
    """

    preset: Preset
    gpus: int
    tp: int = 1
    etp: int = 1
    ep: int = 1
    cp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    seq_length: int = 4096
    micro_batch_size: int = 1
    global_batch_size: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = Recompute()
    mlp_chunks: int = 1
    loss_chunk: int = 0
    distributed_optimizer: bool = True
    offload: float = 0.0
    grad_bytes: int = 4
    overlap: bool = False
    expert_load: float = 1.0
    cp_comm_type: str = "auto"

    @property
    def dp(self) -> int:
        """Copies of the model that see other sequences."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Copies of an expert."""
        return self.gpus // (self.etp * self.ep * self.pp)

    @property
    def microbatches(self) -> int:
        """Forward passes of a rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def local_experts(self) -> int:
        """Experts of a layer on one rank."""
        return self.preset.num_experts // self.ep

    @property
    def exchange(self) -> str:
        """How full layers exchange keys over the context parallel ranks, '' on one.

        "auto" gathers keys within a machine and passes them round between machines, which keep
        the same tensors.
        """
        if self.cp == 1:
            return ""
        return "all_gather" if self.cp_comm_type == "auto" else self.cp_comm_type

    def problem(self) -> str | None:
        """Why Megatron refuses the layout, in one sentence; None if it does not."""
        preset = self.preset
        for name, size, whole, what in (
            ("tp", self.tp, preset.num_attention_heads, "attention heads"),
            ("tp", self.tp, preset.num_query_groups, "key and value heads"),
            ("tp", self.tp, preset.vocab_size, "rows of the vocabulary"),
            ("etp", self.etp, preset.moe_ffn_hidden_size, "columns of an expert"),
            ("ep", self.ep, preset.num_experts, "experts"),
            ("pp", self.pp * self.virtual_stages, preset.num_layers, "layers"),
            ("tp * cp * pp", self.tp * self.cp * self.pp, self.gpus, "GPUs"),
            ("etp * ep * pp", self.etp * self.ep * self.pp, self.gpus, "GPUs"),
        ):
            if whole % size:
                return f"{name} = {size} does not divide the {whole} {what}."
        parts = math.lcm(2 * self.cp, self.cp * self.tp) if self.cp > 1 else self.tp
        if self.seq_length % parts:
            return (
                f"the sequence length {self.seq_length} is not a multiple of {parts} "
                f"(tp {self.tp}, cp {self.cp})."
            )
        if self.global_batch_size % (self.micro_batch_size * self.dp):
            return (
                f"the global batch of {self.global_batch_size} is not a multiple of micro batch "
                f"{self.micro_batch_size} * dp {self.dp}."
            )
        return None

    def policy(self) -> str:
        """The word of --memory for these flags, or what they are; * for another chunk of the loss."""
        for name in POLICIES:
            if self.recompute == Recompute.of_policy(name):
                return name if self.loss_chunk == loss_chunk_of(name) else f"{name}*"
        if self.recompute.granularity == "full":
            return f"{self.recompute.method} {self.recompute.num_layers}"
        return "+".join(self.recompute.modules) or "none"

    def flags(self, preset_flag: bool = True) -> list[str]:
        """The command line that asks for this layout, one flag with its value an element."""
        flags = self._preset_flags() if preset_flag else []
        sizes = {
            "--tensor-model-parallel-size": self.tp,
            "--expert-model-parallel-size": self.ep,
            "--context-parallel-size": self.cp,
            "--pipeline-model-parallel-size": self.pp,
        }
        flags += [f"{name} {size}" for name, size in sizes.items() if size > 1]
        if self.tp > 1:
            flags.append(f"--expert-tensor-parallel-size {self.etp}")
        if self.sequence_parallel:
            flags.append("--sequence-parallel")
        flags += [
            f"--seq-length {self.seq_length}",
            f"--micro-batch-size {self.micro_batch_size}",
            f"--global-batch-size {self.global_batch_size}",
            "--bf16",
            f"--memory {self.policy().removesuffix('*')}",
        ]
        if self.policy().endswith("*"):
            flags.append(f"--lm-loss-chunk-size {self.loss_chunk}")
        if self.grad_bytes == 2:
            flags.append("--grad-reduce-in-bf16")
        if self.distributed_optimizer:
            flags.append("--use-distributed-optimizer")
        if self.offload:
            flags += ["--optimizer-cpu-offload", "--use-precision-aware-optimizer"]
            flags.append("--overlap-cpu-optimizer-d2h-h2d")
        return flags

    def _preset_flags(self) -> list[str]:
        preset = self.preset
        flags = [f"--preset {preset.name}"]
        if preset.num_layers != PRESETS[preset.name].num_layers:
            flags.append(f"--preset-layers {preset.num_layers}")
        if self.seq_length > preset.max_position_embeddings:  # Megatron refuses it otherwise
            factor = -(-self.seq_length // preset.yarn_original_max_position_embeddings)
            flags.append(f"--yarn-factor {factor}")
        return flags
