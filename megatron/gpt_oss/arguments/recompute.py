# Copyright (c) 2026, the megatron-core gptoss authors.

"""--memory: activation recompute policies.

A policy sets Megatron's recompute flags; flags on the command line take precedence. No policy uses
"core_attn", because the attention kernels store no scores, or "layernorm", whose recompute compiles
C++ when it first runs.
"""

from argparse import Namespace

from megatron.gpt_oss.errors import UsageError

# Tokens per chunk of the loss, half of a preset's LM_LOSS_CHUNK_SIZE (flags.py).
LEAN_LOSS_CHUNK = 2048

# Values by dest. Arguments that a policy leaves out keep their default, no recompute.
POLICIES: dict[str, dict] = {
    "fast": {},
    # The experts' activation is a sixth of a layer's stored activations; its recompute takes 2 to
    # 5 % of the experts' time (benchmarks/kernels/experts.py).
    "balanced": {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    # The MoE layer stores only its input: a third more of its GEMMs and all-to-alls, and none of
    # attention, which takes most of the time of a long sequence. Load imbalance of the experts then
    # costs memory in one layer only.
    "experts": {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
        "lm_loss_chunk_size": LEAN_LOSS_CHUNK,
    },
    # A layer stores only its input: a third more GEMMs and two sevenths more attention.
    "lean": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "lm_loss_chunk_size": LEAN_LOSS_CHUNK,
    },
}

# One of these on the command line replaces all recompute flags of a policy, because parts of two
# policies may not fit together.
RECOMPUTE = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "recompute_activations",
)


def policy_flags(given: Namespace, args: Namespace) -> dict:
    """Defaults that --memory sets, by dest; {} without the flag.

    Args:
        given: the arguments that the command line gives, without defaults.
        args: the arguments, before Megatron's validation.
    Raises:
        UsageError: the policy needs a feature that other flags disable.
    """
    name = getattr(given, "memory", None)
    if name is None:
        return {}
    if name not in POLICIES:
        raise UsageError(f"--memory {name} is unknown. Choose one of {', '.join(POLICIES)}.")
    flags = dict(POLICIES[name])
    if any(hasattr(given, dest) for dest in RECOMPUTE):
        flags = {dest: flag for dest, flag in flags.items() if dest not in RECOMPUTE}
    grouped = args.moe_grouped_gemm is True  # without a default it is argparse.SUPPRESS
    if "moe_act" in flags.get("recompute_modules", ()) and not grouped:
        raise UsageError(
            f"--memory {name} recomputes the experts' activation in the backward, which needs "
            "grouped GEMMs. Give --moe-grouped-gemm, or --memory lean."
        )
    if not args.lm_loss_chunk_size:  # the loss is not chunked
        flags.pop("lm_loss_chunk_size", None)
    return {dest: flag for dest, flag in flags.items() if not hasattr(given, dest)}
