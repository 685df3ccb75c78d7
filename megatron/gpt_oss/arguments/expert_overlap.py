# Copyright (c) 2026, the megatron-core gptoss authors.

"""Requirements of --overlap-moe-expert-parallel-comm, checked before process groups exist.

The flag overlaps the expert all-to-all of one micro-batch with the backward of another. Each layer
is split into parts (attention and router, dispatch, experts, combine) with their own autograd
graphs. The rules are those of Megatron's TransformerConfig, which asserts them when it is created,
and limitations of our experts and of --transformer-impl local.
"""

from argparse import Namespace
from typing import Iterator

from megatron.gpt_oss.errors import UsageError

FLAG = "--overlap-moe-expert-parallel-comm"


def check_expert_overlap(args: Namespace) -> None:
    """Refuse arguments that the overlapped schedule does not support.

    Args:
        args: the arguments, with those of --memory, before Megatron's validation.
    Raises:
        UsageError: names the flag, its value and what to give instead.
    """
    if args.overlap_moe_expert_parallel_comm:
        for problem in _problems(args):
            raise UsageError(f"{FLAG} {problem}")
    elif args.delay_wgrad_compute:
        raise UsageError(f"--delay-wgrad-compute needs {FLAG}, which is not given. Drop it.")


def _problems(args: Namespace) -> Iterator[str]:
    if args.expert_model_parallel_size < 2:
        yield (
            f"hides the all-to-all of expert parallelism, and --expert-model-parallel-size is "
            f"{args.expert_model_parallel_size}. Give 2 or more, or drop the flag."
        )
    dispatcher = args.moe_token_dispatcher_type
    if dispatcher not in ("alltoall", "flex"):
        yield (
            f"does not support --moe-token-dispatcher-type {dispatcher}. Give "
            "--moe-token-dispatcher-type alltoall."
        )
    virtual = (
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
    )
    if args.pipeline_model_parallel_size > 1 and not any(getattr(args, dest) for dest in virtual):
        yield (
            f"with --pipeline-model-parallel-size {args.pipeline_model_parallel_size} needs "
            "virtual stages, because it uses the interleaved schedule. Give "
            "--num-virtual-stages-per-pipeline-rank 2 or more."
        )
    if not (args.bf16 or args.fp16):
        yield "needs bf16 or fp16 training. Give --bf16, or drop the flag."
    modules = args.recompute_modules or ()
    if args.recompute_granularity == "full" or args.recompute_method:
        yield (
            "splits a layer, which full-layer recompute (--memory lean, "
            "--recompute-granularity full) does not support. Give --memory balanced or fast."
        )
    if args.recompute_granularity == "selective" and "moe" in modules:
        yield (
            "splits the MoE layer, which its recompute (--memory experts, "
            "--recompute-modules moe) does not support. Give --memory balanced or fast."
        )
    if args.delay_wgrad_compute and args.transformer_impl != "transformer_engine":
        yield (
            "with --delay-wgrad-compute needs layers with a separate wgrad step, which "
            f"--transformer-impl {args.transformer_impl} does not have. Drop "
            "--delay-wgrad-compute: the communication is hidden without it."
        )
