# Copyright (c) 2026, the megatron-core gptoss authors.

"""Convert loaded state of one optimizer to that of several, and of several to that of one.

Without expert parallelism one distributed optimizer has all parameters. With expert parallelism a
second one has the experts, whose data-parallel group differs. A `fully_reshardable` checkpoint
stores tensors by parameter, so either layout can load them. The other state lies at the top level
for one optimizer, and under the index of each optimizer for several.
"""

from typing import Any, Dict, List

RESHARDABLE = "fully_reshardable"
SHARDING_TYPE = "param_state_sharding_type"


def match_chain(state_dict: Any, num_optimizers: int) -> Any:
    """Convert loaded state to the form for `num_optimizers` optimizers.

    Args:
        state_dict: state dict of a ChainedOptimizer, as loaded from a checkpoint.
        num_optimizers: number of optimizers of this run.

    Returns:
        The state; converted if one of the two has one optimizer and the other several.

    Raises:
        ValueError: the numbers differ, and the format cannot be converted.
    """
    if not isinstance(state_dict, dict):
        return state_dict
    numbered = {key: value for key, value in state_dict.items() if isinstance(key, int)}
    if num_optimizers > 1 and state_dict.get(SHARDING_TYPE) == RESHARDABLE:
        # The entries by index hold only tensors.
        shared = {key: value for key, value in state_dict.items() if key not in numbered}
        shared["optimizer"] = _state_of_both_kinds([shared])
        return {number: {**shared, **numbered.get(number, {})} for number in range(num_optimizers)}
    saved = [value for _, value in sorted(numbered.items()) if SHARDING_TYPE in value]
    if num_optimizers == 1 and saved and saved[0][SHARDING_TYPE] == RESHARDABLE:
        own = {key: value for key, value in state_dict.items() if key not in numbered}
        return {**saved[0], "optimizer": _state_of_both_kinds(saved), **own}
    if num_optimizers == 1 and numbered:
        raise _layout_mismatch(len(numbered), 1)
    if num_optimizers > 1 and not numbered:
        raise _layout_mismatch(1, num_optimizers)
    return state_dict


def _layout_mismatch(saved: int, wanted: int) -> ValueError:
    return ValueError(
        f"the checkpoint holds the state of {saved} optimizer(s), and this layout has {wanted}: "
        "experts have a separate optimizer if their parallel sizes differ from those of the other "
        "layers. Use the expert parallel sizes of the run that wrote it, or give --no-load-optim. "
        "Checkpoints saved with --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
        "load at every size."
    )


def _state_of_both_kinds(states: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Optimizer state without tensors, in which each group exists for experts and for others.

    `is_expert_parallel` is one of the fields that identify a group, and depends on the layout.
    """
    groups = [group for state in states for group in state["optimizer"]["param_groups"]]
    # Saved groups come last: upstream uses the last of several that match.
    copies = [{**group, "is_expert_parallel": not group["is_expert_parallel"]} for group in groups]
    return {**states[0]["optimizer"], "param_groups": [*copies, *groups]}
