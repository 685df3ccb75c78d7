# Copyright (c) 2026, the megatron-core gptoss authors.

"""Brings loaded state of one optimizer to several, and of several to one.

Without expert parallelism one distributed optimizer has all parameters; with it experts have a
second one, for their data-parallel group is another. In `fully_reshardable` checkpoints the tensors
lie by parameter and are loaded whichever optimizer asks for them. What differs is where the rest
stands: at the top of the state, or under the number of each optimizer.
"""

from typing import Any, Dict, List

RESHARDABLE = 'fully_reshardable'
SHARDING_TYPE = 'param_state_sharding_type'


def match_chain(state_dict: Any, num_optimizers: int) -> Any:
    """Arrange loaded state for that many optimizers.

    Args:
        state_dict: of a ChainedOptimizer, as loaded from a checkpoint.
        num_optimizers: of this run.

    Returns:
        The state as it is, or where a checkpoint has one optimizer's and this run several, or the
        other way round, in the other form.

    Raises:
        ValueError: the number differs, and the format cannot be arranged.
    """
    if not isinstance(state_dict, dict):
        return state_dict
    numbered = {key: value for key, value in state_dict.items() if isinstance(key, int)}
    if num_optimizers > 1 and state_dict.get(SHARDING_TYPE) == RESHARDABLE:
        # Under the numbers there are only the tensors.
        shared = {key: value for key, value in state_dict.items() if key not in numbered}
        shared['optimizer'] = _for_any_parameters([shared])
        return {number: {**shared, **numbered.get(number, {})} for number in range(num_optimizers)}
    saved = [value for _, value in sorted(numbered.items()) if SHARDING_TYPE in value]
    if num_optimizers == 1 and saved and saved[0][SHARDING_TYPE] == RESHARDABLE:
        own = {key: value for key, value in state_dict.items() if key not in numbered}
        return {**saved[0], 'optimizer': _for_any_parameters(saved), **own}
    if num_optimizers == 1 and numbered:
        raise _of_other_layout(len(numbered), 1)
    if num_optimizers > 1 and not numbered:
        raise _of_other_layout(1, num_optimizers)
    return state_dict


def _of_other_layout(saved: int, wanted: int) -> ValueError:
    return ValueError(
        f"the checkpoint holds the state of {saved} optimizer(s), and this layout has {wanted}: "
        "experts have one of their own where their parallel sizes are not those of the other "
        "layers. Take the expert parallel sizes of the run that wrote it, or give --no-load-optim; "
        "with --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable a run saves what "
        "loads at every size."
    )


def _for_any_parameters(states: List[Dict[str, Any]]) -> Dict[str, Any]:
    """The optimizers' state but for tensors, with each group of parameters for experts and others.

    `is_expert_parallel` is part of what identifies a group, and depends on the layout alone.
    """
    groups = [group for state in states for group in state['optimizer']['param_groups']]
    # What was saved counts more than its copy: the last of several alike is taken.
    copies = [{**group, 'is_expert_parallel': not group['is_expert_parallel']} for group in groups]
    return {**states[0]['optimizer'], 'param_groups': [*copies, *groups]}
