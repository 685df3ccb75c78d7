# Copyright (c) 2026, the megatron-core gptoss authors.

"""--memory: how much of a step is computed again to keep less of it, as one word.

A word stands for Megatron's own flags, and any of those on the command line wins. "core_attn" is
not among them, for the attention kernels keep no scores; nor "layernorm", whose recomputation
compiles C++ when it first runs.
"""

from argparse import Namespace
from typing import Callable

from megatron.gpt_oss.errors import UsageError

# Tokens whose logits live at a time; a preset takes LM_LOSS_CHUNK_SIZE of flags.py.
LEAN_LOSS_CHUNK = 2048

# By dest; what a policy leaves out keeps its default, which is no recomputation.
POLICIES: dict[str, dict] = {
    "fast": {},
    # The experts' activation, a sixth of what a layer keeps, costs 2 to 5 % of the experts' time to
    # make again (benchmarks/kernels/experts.py).
    "balanced": {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    # The experts' part keeps its input: a third more of its products and exchanges, nothing of
    # attention, which is most of a long sequence's time. Busy experts cost memory in one layer only.
    "experts": {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
        "lm_loss_chunk_size": LEAN_LOSS_CHUNK,
    },
    # A layer keeps its input alone: a third more of products, two sevenths of attention. Half the
    # logits of a preset's chunk.
    "lean": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "lm_loss_chunk_size": LEAN_LOSS_CHUNK,
    },
}

# One of these on the command line replaces what a policy says of recomputation, all of it: halves
# of two policies would not fit each other.
RECOMPUTE = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "recompute_activations",
)


def policy_flags(given: Namespace, value: Callable[[str], object]) -> dict:
    """What --memory puts under the command line, by dest; nothing without it.

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
