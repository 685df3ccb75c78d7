# Copyright (c) 2026, the megatron-core gptoss authors.

"""--memory: policies of activation recomputation.

A policy is a set of Megatron's flags; those on the command line win. No policy recomputes
"core_attn", because the attention kernels save no scores, or "layernorm", whose recomputation
compiles C++ when it first runs.
"""

from argparse import Namespace
from typing import Callable

from megatron.gpt_oss.errors import UsageError

# --lm-loss-chunk-size in tokens; presets use LM_LOSS_CHUNK_SIZE of flags.py.
LEAN_LOSS_CHUNK = 2048

# By dest; the default of other flags is no recomputation.
POLICIES: dict[str, dict] = {
    "fast": {},
    # Recomputes the experts' activation, a sixth of what a layer saves, for 2 to 5 % of the experts'
    # time (benchmarks/kernels/experts.py).
    "balanced": {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    # Saves the input of the MoE layer: a third more expert GEMMs and communication, and no more
    # attention, which takes most of the time of long sequences. Load imbalance needs memory in one
    # layer only.
    "experts": {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
        "lm_loss_chunk_size": LEAN_LOSS_CHUNK,
    },
    # Saves only the input of a layer: a third more GEMMs, two sevenths more attention. Half of a
    # preset's loss chunk.
    "lean": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "lm_loss_chunk_size": LEAN_LOSS_CHUNK,
    },
}

# One of these on the command line replaces all recompute flags of a policy, because parts of two
# policies are not compatible.
RECOMPUTE = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "recompute_activations",
)


def policy_flags(given: Namespace, value: Callable[[str], object]) -> dict:
    """Flags of --memory by dest that the command line does not give; empty without --memory.

    Args:
        given: the flags on the command line, and no defaults.
        value: the argument of a name with the defaults in it, before Megatron's validation.
    Raises:
        UsageError: the policy needs something that the other flags leave out.
    """
    name = getattr(given, "memory", None)
    if name is None:
        return {}
    if name not in POLICIES:
        raise UsageError(f"--memory {name} is unknown. Choose one of {', '.join(POLICIES)}.")
    flags = dict(POLICIES[name])
    if any(hasattr(given, dest) for dest in RECOMPUTE):
        flags = {dest: flag for dest, flag in flags.items() if dest not in RECOMPUTE}
    grouped = value("moe_grouped_gemm") is True  # a flag without a default has argparse's mark
    if "moe_act" in flags.get("recompute_modules", ()) and not grouped:
        raise UsageError(
            f"--memory {name} recomputes the experts' activation in the backward, which needs "
            "grouped GEMMs. Give --moe-grouped-gemm, or --memory lean."
        )
    if not value("lm_loss_chunk_size"):  # all logits at once, because the run needs it or says so
        flags.pop("lm_loss_chunk_size", None)
    return {dest: flag for dest, flag in flags.items() if not hasattr(given, dest)}
