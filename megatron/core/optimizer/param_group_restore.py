# Copyright (c) 2026, the megatron-core gptoss authors.

"""Parameter groups after a checkpoint's optimizer state is loaded.

A group's hyperparameters (rates, weight decay, betas, eps) are the command line's. A checkpoint holds
those of the command that wrote it; what it alone knows of a group is how many updates were made.
"""

from typing import Dict, List


def restored_param_groups(current: List[Dict], saved: List[Dict]) -> List[Dict]:
    """The optimizer's own groups, with the number of updates that a checkpoint holds.

    Args:
        current: `param_groups` of the torch optimizer's state dict, whose 'params' are indices.
        saved: `param_groups` of the checkpoint. Those that list 'params' (formats that store the
            optimizer's state by index) must hold the same parameters.
    Returns:
        New dictionaries, in the order of `current`.
    Raises:
        ValueError: state is stored by index, and the groups divide the parameters differently.
    """
    if any('params' in group for group in saved):
        _check_same_division(current, saved)
    # The state dict of an optimizer that counts updates in its groups has one number for all.
    steps = [group['step'] for group in saved if group.get('step') is not None]
    counted = {'step': steps[0]} if steps else {}
    return [{**group, **counted} for group in current]


def _check_same_division(current: List[Dict], saved: List[Dict]) -> None:
    now, then = ([_outline(group, groups[0]) for group in groups] for groups in (current, saved))
    if now != then:
        raise ValueError(
            "The optimizer state of this checkpoint is stored by the index of a parameter, and its "
            f"{len(saved)} parameter groups divide the parameters otherwise than this command's "
            f"{len(current)}. Give the same learning-rate multipliers, or --no-load-optim."
        )


def _outline(group: Dict, first: Dict) -> tuple:
    """What identifies a group whatever the rates are: they count relative to the first group's."""
    relative = None
    if group.get('max_lr') is not None and first.get('max_lr'):
        relative = float(f"{group['max_lr'] / first['max_lr']:.6g}")
    return (
        len(group.get('params', ())),
        group.get('is_expert_parallel'),
        group.get('wd_mult', group.get('pre_wd_mult')),
        relative,
    )
