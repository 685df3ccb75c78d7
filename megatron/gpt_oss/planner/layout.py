# Copyright (c) 2026, the megatron-core gptoss authors.

"""What the planner knows about a run: model, parallel sizes, batch, recomputation."""

import math
from argparse import Namespace
from dataclasses import dataclass

from megatron.gpt_oss.arguments.flags import DRY_RUN, LM_LOSS_CHUNK_SIZE
from megatron.gpt_oss.arguments.recompute import POLICIES
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.presets import PRESETS, Preset


def loss_chunk_of(policy: str) -> int:
    """The --lm-loss-chunk-size of a --memory policy."""
    return POLICIES[policy].get("lm_loss_chunk_size", LM_LOSS_CHUNK_SIZE)


@dataclass(frozen=True)
class Recompute:
    """Megatron's recompute flags: granularity None, 'selective' or 'full'."""

    granularity: str | None = None
    modules: tuple[str, ...] = ()
    method: str | None = None
    num_layers: int = 1

    @classmethod
    def from_policy(cls, name: str) -> "Recompute":
        """The flags of a --memory policy."""
        flags = POLICIES[name]
        return cls(
            flags.get("recompute_granularity"),
            tuple(flags.get("recompute_modules", ())),
            flags.get("recompute_method"),
            flags.get("recompute_num_layers", 1),
        )

    @classmethod
    def from_args(cls, args: Namespace) -> "Recompute":
        """Read validated Megatron arguments."""
        granularity = args.recompute_granularity
        return cls(
            granularity,
            tuple(args.recompute_modules or ["core_attn"]) if granularity == "selective" else (),
            args.recompute_method if granularity == "full" else None,
            args.recompute_num_layers or 1,
        )

    def recomputes(self, module: str) -> bool:
        """Whether selective recomputation covers a module, one of --recompute-modules."""
        return self.granularity == "selective" and module in self.modules


@dataclass(frozen=True)
class Layout:
    """Model, parallel sizes and memory options of one run.

    Attributes:
        gpus: number of ranks.
        tp, etp, ep, cp, pp: tensor, expert tensor, expert, context and pipeline parallel sizes;
            data parallelism gets the remaining ranks.
        virtual_stages: model chunks of a pipeline rank (1: not interleaved).
        mlp_chunks: --mlp-chunks-for-training.
        loss_chunk: --lm-loss-chunk-size in tokens; 0: all logits at once.
        offload: fraction of the optimizer state in CPU memory, 0 to 1.
        grad_bytes: bytes per element of the gradient buffer.
        overlap: gradient reduction and parameter gather overlap with computation.
        expert_load: load imbalance, routed tokens of the most loaded rank over the mean.
        cp_comm_type: of layers without a window.
        expert_fp8: --fp8, FP8 GEMMs of the experts.
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
    expert_fp8: bool = False

    @classmethod
    def from_args(cls, args: Namespace) -> "Layout":
        """Read validated Megatron arguments.

        Raises:
            UsageError: the model has no experts.
        """
        full_layer = 1 if len(args.cp_comm_type) > 1 else 0
        return cls(
            _preset_from_args(args),
            args.world_size,
            tp=args.tensor_model_parallel_size,
            etp=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
            ep=args.expert_model_parallel_size,
            cp=args.context_parallel_size,
            pp=args.pipeline_model_parallel_size,
            virtual_stages=args.virtual_pipeline_model_parallel_size or 1,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            global_batch_size=args.global_batch_size,
            sequence_parallel=args.sequence_parallel,
            recompute=Recompute.from_args(args),
            mlp_chunks=getattr(args, "mlp_chunks_for_training", None) or 1,
            loss_chunk=args.lm_loss_chunk_size,
            distributed_optimizer=args.use_distributed_optimizer,
            offload=args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0,
            grad_bytes=4 if args.accumulate_allreduce_grads_in_fp32 else 2,
            overlap=args.overlap_grad_reduce and args.overlap_param_gather,
            cp_comm_type=args.cp_comm_type[full_layer],
            expert_fp8=args.expert_fp8_recipe is not None,
        )

    @property
    def dp(self) -> int:
        """Data parallel size."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Data parallel size of the experts."""
        return self.gpus // (self.etp * self.ep * self.pp)

    @property
    def microbatches(self) -> int:
        """Micro-batches of a rank per step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def local_experts(self) -> int:
        """Number of local experts per layer."""
        return self.preset.num_experts // self.ep

    @property
    def kv_comm(self) -> str:
        """Communication type of layers without a window; '' without context parallelism.

        "auto" is planned as all_gather; p2p saves the same tensors.
        """
        if self.cp == 1:
            return ""
        return "all_gather" if self.cp_comm_type == "auto" else self.cp_comm_type

    def unsupported_reason(self) -> str | None:
        """Why Megatron rejects the layout, in one sentence; None if it accepts it."""
        return self._indivisible_size() or self._indivisible_batch()

    def _indivisible_size(self) -> str | None:
        preset = self.preset
        for name, size, total, what in (
            ("tp", self.tp, preset.num_attention_heads, "attention heads"),
            ("tp", self.tp, preset.num_query_groups, "key and value heads"),
            ("tp", self.tp, preset.vocab_size, "rows of the vocabulary"),
            ("etp", self.etp, preset.moe_ffn_hidden_size, "columns of an expert"),
            ("ep", self.ep, preset.num_experts, "experts"),
            ("pp", self.pp * self.virtual_stages, preset.num_layers, "layers"),
            ("tp * cp * pp", self.tp * self.cp * self.pp, self.gpus, "GPUs"),
            ("etp * ep * pp", self.etp * self.ep * self.pp, self.gpus, "GPUs"),
        ):
            if total % size:
                return f"{name} = {size} does not divide the {total} {what}."
        return None

    def _indivisible_batch(self) -> str | None:
        chunks = math.lcm(2 * self.cp, self.cp * self.tp) if self.cp > 1 else self.tp
        if self.seq_length % chunks:
            return (
                f"the sequence length {self.seq_length} is not a multiple of {chunks} "
                f"(tp {self.tp}, cp {self.cp})."
            )
        if self.global_batch_size % (self.micro_batch_size * self.dp):
            return (
                f"the global batch of {self.global_batch_size} is not a multiple of micro batch "
                f"{self.micro_batch_size} * dp {self.dp}."
            )
        return None

    def policy(self) -> str:
        """The --memory policy with these flags, or the flags themselves.

        A * after the policy marks another --lm-loss-chunk-size.
        """
        for name in POLICIES:
            if self.recompute == Recompute.from_policy(name):
                return name if self.loss_chunk == loss_chunk_of(name) else f"{name}*"
        if self.recompute.granularity == "full":
            return f"{self.recompute.method} {self.recompute.num_layers}"
        return "+".join(self.recompute.modules) or "none"

    def flags(self, preset_flag: bool = True) -> list[str]:
        """The command line of this layout, one element per flag with its value."""
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
        if self.expert_fp8:
            flags.append("--fp8")
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


def _preset_from_args(args: Namespace) -> Preset:
    if not args.num_experts:
        raise UsageError(f"{DRY_RUN} supports only MoE models. Give --preset or --num-experts.")
    return Preset(
        name=args.preset,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups or args.num_attention_heads,
        head_dim=args.kv_channels,
        num_experts=args.num_experts,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        vocab_size=args.padded_vocab_size,
        seq_length=args.seq_length,
        num_experts_per_tok=args.moe_router_topk,
        sliding_window=args.window_size[0] + 1 if args.window_size else args.seq_length,
    )
