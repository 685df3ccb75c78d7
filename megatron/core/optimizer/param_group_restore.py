# Copyright (c) 2026, the megatron-core gptoss authors.

"""Parameter groups after a checkpoint's optimizer state is loaded.

The hyperparameters of a group (rates, weight decay, betas, eps) are those of the command line, not
those that the checkpoint holds. Only the number of updates is taken from the checkpoint.
"""

from typing import Dict, List


def restored_param_groups(current: List[Dict], saved: List[Dict]) -> List[Dict]:
    """The optimizer's own groups, with the number of updates from a checkpoint.

    Args:
        current: `param_groups` of the torch optimizer's state dict, whose 'params' are indices.
        saved: `param_groups` of the checkpoint. If they list 'params' (formats that store the
            optimizer's state by index), each group must hold the same parameters.
    Returns:
        New dictionaries, in the order of `current`.
    Raises:
        ValueError: state is stored by index, and the groups divide the parameters differently.
    """
    if any("params" in group for group in saved):
        _check_same_division(current, saved)
    # An optimizer that counts updates in its groups has the same number in all of them.
    steps = [group["step"] for group in saved if group.get("step") is not None]
    counted = {"step": steps[0]} if steps else {}
    return [{**group, **counted} for group in current]


def _check_same_division(current: List[Dict], saved: List[Dict]) -> None:
    now, then = ([_outline(group, groups[0]) for group in groups] for groups in (current, saved))
    if now != then:
        raise ValueError(
            "The optimizer state of this checkpoint is stored by parameter index, and its "
            f"{len(saved)} parameter groups divide the parameters differently from this command's "
            f"{len(current)}. Give the same learning-rate multipliers, or --no-load-optim."
        )


def _outline(group: Dict, first: Dict) -> tuple:
    """The fields that identify a group; its rate is relative to that of the first group."""
    relative = None
    if group.get("max_lr") is not None and first.get("max_lr"):
        relative = float(f"{group['max_lr'] / first['max_lr']:.6g}")
    return (
        len(group.get("params", ())),
        group.get("is_expert_parallel"),
        group.get("wd_mult", group.get("pre_wd_mult")),
        relative,
    )
