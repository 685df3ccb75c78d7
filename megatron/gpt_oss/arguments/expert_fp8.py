# Copyright (c) 2026, the megatron-core gptoss authors.

"""FP8 GEMMs of the experts with --transformer-impl local: --fp8, or --fp8-format e4m3 and
--fp8-recipe rowwise.

Megatron's `fp8` means TransformerEngine's FP8 context, in many places. On the local route it is
therefore cleared, and `expert_fp8_recipe` of the config names the recipe of GroupedExperts.
"""

from argparse import Namespace

from megatron.gpt_oss.errors import UsageError

FLAG = "--fp8"
FORMAT, RECIPE = "e4m3", "rowwise"


def set_expert_fp8(given: Namespace, args: Namespace) -> None:
    """Translate the flags for the local route; refuse what it does not support.

    Args:
        given: the arguments that the command line gives.
        args: all arguments, before Megatron's validation; changed in place.
    Raises:
        UsageError: names the flag, its value and what to give instead.
    """
    recipe = getattr(args.fp8_recipe, "value", args.fp8_recipe)
    local = args.transformer_impl == "local"
    if args.fp8_word:
        for dest, value, flag in (
            ("fp8", args.fp8, "--fp8-format"),
            ("fp8_recipe", recipe, "--fp8-recipe"),
        ):
            if hasattr(given, dest):
                raise UsageError(f"{FLAG} and {flag} {value}: give one of them.")
        if not local:
            raise UsageError(
                f"{FLAG} is the FP8 of --transformer-impl local. With {args.transformer_impl} give "
                "--fp8-format and --fp8-recipe."
            )
        args.fp8, recipe = FORMAT, RECIPE
    if recipe == RECIPE and not (local and args.fp8):
        raise UsageError(
            f"--fp8-recipe {RECIPE} needs --fp8-format {FORMAT} and --transformer-impl local. "
            "TransformerEngine has tensorwise, blockwise, delayed and mxfp8."
        )
    if not local or not args.fp8:
        return
    if args.fp8 != FORMAT or recipe != RECIPE:
        raise UsageError(
            f"--fp8-format {args.fp8} --fp8-recipe {recipe} needs TransformerEngine: give "
            f"--transformer-impl transformer_engine, or {FLAG} for the FP8 of the local route "
            f"(--fp8-format {FORMAT} --fp8-recipe {RECIPE})."
        )
    if not args.bf16:
        raise UsageError(f"{FLAG} needs --bf16: the weights are quantised from it. Give --bf16.")
    if not args.moe_grouped_gemm:
        raise UsageError(f"{FLAG} needs grouped GEMMs of the experts. Drop --no-moe-grouped-gemm.")
    args.fp8, args.fp8_recipe, args.expert_fp8_recipe = None, "delayed", RECIPE
