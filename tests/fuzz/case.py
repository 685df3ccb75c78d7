# Copyright (c) 2026, the megatron-core gptoss authors.

"""A fuzz case: what is computed (`Problem`), and how it is split over ranks (`Layout`).

Everything in a `Problem` changes the numbers of a run, so that one reference serves every layout of
it; nothing in a `Layout` may change them. Both become flags of pretrain_gpt_oss.py.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Iterator

from megatron.gpt_oss.presets import Preset, get_preset

STEPS = 3
WORLD_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Problem:
    """Model, data and training arguments: everything that the losses depend on."""

    seed: int = 0
    # The model.
    num_layers: int = 2
    hidden_size: int = 24
    num_query_groups: int = 2
    heads_per_group: int = 2
    head_dim: int = 8
    num_experts: int = 4
    topk: int = 2
    expert_width: int = 20
    vocab_size: int = 64
    window: int = 6
    yarn_original: int = 12
    sink_scale: float = 4.0
    # The data.
    seq_length: int = 32
    corpus: str = "mixed"  # how long the documents are: see `data.CORPORA`
    packed: bool = False
    positions: str = "restart"  # of packed documents
    eod_mask_loss: bool = False
    # The training.
    dtype: str = "fp32"
    micro_batch_size: int = 1
    global_batch_size: int = 8
    per_token_loss: bool = False
    load_balancing: str = "none"
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0
    router_dtype: str = "fp32"
    freeze: tuple[str, ...] = ()
    lr_multiplier: tuple[str, ...] = ()
    clip_grad: float = 1.0
    weight_decay: float = 0.1
    decay_style: str = "cosine"
    warmup: int = 1

    @property
    def num_heads(self) -> int:
        """Query heads of the model."""
        return self.num_query_groups * self.heads_per_group

    @property
    def mean_of_micro_batches(self) -> bool:
        """Whether the micro-batches' sizes matter: means over tokens of unequal numbers, or losses
        of the router, which are of a micro-batch."""
        masked = self.eod_mask_loss and not self.per_token_loss
        return masked or bool(self.aux_loss_coeff or self.z_loss_coeff)

    def preset(self) -> Preset:
        """The model as a preset of the family."""
        return dataclasses.replace(
            get_preset("tiny"),
            name="fuzz",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_query_groups,
            head_dim=self.head_dim,
            num_experts=self.num_experts,
            num_experts_per_tok=self.topk,
            moe_ffn_hidden_size=self.expert_width,
            vocab_size=self.vocab_size,
            seq_length=self.seq_length,
            sliding_window=self.window,
            yarn_original_max_position_embeddings=self.yarn_original,
            max_position_embeddings=self.yarn_original * 32,
        )

    def flags(self) -> list[str]:
        """Flags of the command line, without paths."""
        # In bf16 two splits of a sum differ enough to drift apart at the higher rate.
        rate = 2e-3 if self.dtype == "bf16" else 2e-2
        words = (
            "--preset fuzz --tokenizer-type NullTokenizer "
            f"--vocab-size {self.vocab_size} --split 80,20,0 --num-workers 0 "
            f"--seed {self.seed + 1} --seq-length {self.seq_length} "
            f"--global-batch-size {self.global_batch_size} --train-iters {STEPS} --eval-iters 1 "
            f"--lr {rate} --min-lr {rate / 10} --lr-decay-style {self.decay_style} "
            f"--lr-warmup-iters {self.warmup} --adam-beta2 0.95 --adam-eps 1e-4 "
            f"--weight-decay {self.weight_decay} --clip-grad {self.clip_grad} "
            f"--moe-router-dtype {self.router_dtype} "
            f"--moe-router-load-balancing-type {self.load_balancing} "
            f"--moe-aux-loss-coeff {self.aux_loss_coeff} "
            "--monitor-interval 0 --log-interval 1 --distributed-timeout-minutes 1"
        ).split()
        if self.decay_style == "WSD":
            words += ["--lr-wsd-decay-iters", "1", "--lr-wsd-decay-style", "linear"]
        if self.z_loss_coeff:
            words += ["--moe-z-loss-coeff", str(self.z_loss_coeff)]
        if self.packed:
            words += ["--dataloader-inter-document-masking"]
            words += ["--document-positions", self.positions]
        for flag, given in (
            ("--eod-mask-loss", self.eod_mask_loss),
            ("--calculate-per-token-loss", self.per_token_loss),
            ("--bf16", self.dtype == "bf16"),
        ):
            words += [flag] if given else []
        if self.freeze:
            words += ["--freeze", *self.freeze]
        if self.lr_multiplier:
            words += ["--lr-multiplier", *self.lr_multiplier]
        return words


@dataclass(frozen=True)
class Layout:
    """How a problem is split over ranks, and other options that must not change the losses."""

    tp: int = 1
    sequence_parallel: bool = False
    pp: int = 1
    vpp: int = 1  # virtual stages a rank, of even numbers of layers
    stages: str = ""  # --pipeline-model-parallel-layout, in place of vpp
    cp: int = 1
    cp_comm: str = "auto"
    ep: int = 1
    etp: int = 1
    dp: int = 1
    micro_batch_size: int = 0  # 0: the problem's
    distributed_optimizer: bool = False
    buckets: int = 0  # --ddp-num-buckets
    bucket_size: int = 0  # --ddp-bucket-size, parameters
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    grad_reduce_in_bf16: bool = False
    grouped: bool = True
    dispatcher: str = "alltoall"
    recompute: str = ""  # a word of --memory, or flags
    loss_chunk: int = 0
    async_save: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks of the layout."""
        return self.tp * self.pp * self.cp * self.dp

    def flags(self, problem: Problem) -> list[str]:
        """Flags of the command line."""
        words = (
            f"--tensor-model-parallel-size {self.tp} --pipeline-model-parallel-size {self.pp} "
            f"--context-parallel-size {self.cp} --expert-model-parallel-size {self.ep} "
            f"--expert-tensor-parallel-size {self.etp} "
            f"--micro-batch-size {self.micro_batch_size or problem.micro_batch_size} "
            f"--moe-token-dispatcher-type {self.dispatcher} "
            f"--lm-loss-chunk-size {self.loss_chunk}"
        ).split()
        if self.cp > 1:
            words += ["--cp-comm-type", *self.cp_comm.split()]
            if "a2a+p2p" in self.cp_comm:
                words += ["--hierarchical-context-parallel-sizes", "2", str(self.cp // 2)]
        if self.stages:
            words += ["--pipeline-model-parallel-layout", self.stages]
        elif self.vpp > 1:
            words += ["--num-virtual-stages-per-pipeline-rank", str(self.vpp)]
        if self.buckets:
            words += ["--ddp-num-buckets", str(self.buckets)]
        if self.bucket_size:
            words += ["--ddp-bucket-size", str(self.bucket_size)]
        for flag, given in (
            ("--sequence-parallel", self.sequence_parallel),
            ("--use-distributed-optimizer", self.distributed_optimizer),
            ("--overlap-grad-reduce", self.overlap_grad_reduce),
            ("--overlap-param-gather", self.overlap_param_gather),
            ("--grad-reduce-in-bf16", self.grad_reduce_in_bf16),
            ("--no-moe-grouped-gemm", not self.grouped),
            ("--async-save", self.async_save),
        ):
            words += [flag] if given else []
        return words + self.recompute.split()


# One process on the plain paths: the reference of every other layout.
PLAIN = Layout(grouped=False)


@dataclass(frozen=True)
class Case:
    """A problem at a layout; optionally saved and resumed at another layout."""

    problem: Problem = Problem()
    layout: Layout = Layout()
    save_at: int = 0  # a step before the last; 0: trained in one go
    resumed: Layout | None = None

    def to_json(self) -> str:
        """JSON of the fields that differ from the defaults, for a command line."""
        found = {"problem": _differing(self.problem), "layout": _differing(self.layout)}
        if self.save_at:
            found.update(save_at=self.save_at, resumed=_differing(self.resumed))
        return json.dumps(found)

    @staticmethod
    def from_json(text: str) -> "Case":
        """The inverse of `to_json`."""
        found = json.loads(text)
        resumed = found.get("resumed")
        return Case(
            problem=Problem(**_tuples(found["problem"])),
            layout=Layout(**found["layout"]),
            save_at=found.get("save_at", 0),
            resumed=None if resumed is None else Layout(**resumed),
        )

    @property
    def world_size(self) -> int:
        """World size of the larger of its two runs."""
        resumed = 1 if self.resumed is None else self.resumed.world_size
        return max(self.layout.world_size, resumed)

    def options(self) -> Iterator[str]:
        """What the case has that the default has not, for counting: 'tp=2', 'packed=True'."""
        for prefix, part in (("", self.problem), ("", self.layout), ("resumed ", self.resumed)):
            for name, value in _differing(part).items() if part is not None else ():
                yield f"{prefix}{name}={value}"
        if self.save_at:
            yield "resumed"


def _differing(part) -> dict:
    return {
        field.name: getattr(part, field.name)
        for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    }


def _tuples(values: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def sequence_multiple(layout: Layout) -> int:
    """The number that must divide the sequence length at this layout."""
    return math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.cp * layout.tp)
