# Copyright (c) 2026, the megatron-core gptoss authors.

"""Position of a run in its learning-rate schedule, its samples and its tokens.

A resumed run uses the schedule of its command line. The position in it is the number of updates if
the command line counts in iterations (--train-iters), and the number of consumed samples if it
counts in samples (--train-samples); skipped updates do not count. With
--use-checkpoint-opt-param-scheduler the schedule of the checkpoint is used instead.

Upstream's `OptimizerParamScheduler` has one counter, in samples, for both. In a run that counts in
iterations every step adds `args.global_batch_size` to it, also during a batch size ramp: the
lengths of its schedule are iterations times that number.
"""

import copy
from argparse import Namespace
from typing import Any, Dict, Optional

from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    update_num_microbatches,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from . import step_callbacks
from .saved_schedule import ADDED, SavedSchedule, format_rate, holds_optimizer
from .utils import print_rank_0


def counts_samples(args: Namespace) -> bool:
    """Whether the command line counts in samples; `train_iters` is then derived."""
    return getattr(args, "train_samples", None) is not None


def steps_per_iteration(scheduler: OptimizerParamScheduler, args: Namespace) -> Optional[int]:
    """What an iteration adds to the scheduler's counter; None: the samples of its batch."""
    own = None if counts_samples(args) else args.global_batch_size
    return getattr(scheduler, "steps_per_iteration", own)


def increment(scheduler: OptimizerParamScheduler, args: Namespace, batch_size: int) -> int:
    """The increment to pass to `scheduler.step` after an update.

    Args:
        batch_size: samples of this step.
    """
    if not isinstance(scheduler, OptimizerParamScheduler):
        return batch_size
    steps = steps_per_iteration(scheduler, args)
    return batch_size if steps is None else steps


def state_dict(scheduler: OptimizerParamScheduler, args: Namespace) -> Dict[str, Any]:
    """Upstream's state dict, and the fields from which the rate at any step follows."""
    state = scheduler.state_dict()
    if not isinstance(scheduler, OptimizerParamScheduler):
        return state
    state.update({name: getattr(scheduler, name) for name in ADDED})
    state["steps_per_iteration"] = steps_per_iteration(scheduler, args)
    return state


def without_param_groups(sharded_state_dict: Dict[str, Any]) -> None:
    """Remove `param_groups` from a sharded state dict, in place.

    A checkpoint may have another number of groups than this run. Upstream merges the loaded list
    into the list of this run item by item, which needs equal lengths.
    """
    for value in list(sharded_state_dict.values()):
        if isinstance(value, dict):
            value.pop("param_groups", None)
            without_param_groups(value)


def resume(
    scheduler: OptimizerParamScheduler, state: Dict[str, Any], iteration: int, args: Namespace
) -> None:
    """Set the scheduler to the position of a resumed run, and log what changes.

    Called on every rank after the optimizer's state is loaded.

    Args:
        state: the loaded checkpoint. Its 'args' are those of the command that wrote it, and
            'opt_param_scheduler' is absent with --no-save-optim.
        iteration: step of the checkpoint. `args.consumed_train_samples` is restored already.
    Raises:
        ScheduleError: --use-checkpoint-opt-param-scheduler, and the checkpoint has no schedule or
            another number of parameter groups.
    """
    saved_args = state.get("args") or Namespace()
    _resume_tokens(saved_args, args)
    if not isinstance(scheduler, OptimizerParamScheduler):
        if holds_optimizer(state) and not args.no_load_optim:
            scheduler.load_state_dict(state["opt_param_scheduler"])
        return
    if counts_samples(args):
        args.train_iters = _iterations_left(args) + iteration
    saved = SavedSchedule(scheduler, state, saved_args, iteration, args)
    command = copy.copy(scheduler)
    command.steps_per_iteration = steps_per_iteration(scheduler, args)
    own_rate = format_rate(saved.rate_by(command))
    now = f"learning rate at step {iteration + 1}: {own_rate} by this command"
    kept = scheduler.use_checkpoint_opt_param_scheduler
    if kept:
        saved.apply_to(scheduler)
        now = (
            f"learning rate at step {iteration + 1}: {format_rate(saved.rate())} by the "
            "checkpoint's "
            f"schedule, which is kept; {own_rate} by this command"
        )
    elif saved.scheduler is not None:
        now += f", {format_rate(saved.rate())} by the checkpoint's schedule"
    scheduler.num_steps = saved.position(steps_per_iteration(scheduler, args), kept)
    scheduler.step(0)
    changes = saved.changes(command, kept)
    restart = _why_moments_restart(state, args)
    if restart:
        now += f"; the optimizer's moments restart from zero ({restart})"
    if changes:
        now += f" ({'; '.join(changes)})"
    if changes or restart:
        print_rank_0(f"> {now}")
        step_callbacks.publish(step_callbacks.ScheduleChanged(iteration, now))


def _why_moments_restart(state: Dict[str, Any], args: Namespace) -> str:
    if args.no_load_optim:
        return "--no-load-optim"
    return "" if holds_optimizer(state) else "the checkpoint was saved with --no-save-optim"


def _iterations_left(args: Namespace) -> int:
    """Remaining iterations of a run that counts in samples; an incomplete last batch is dropped."""
    consumed = args.consumed_train_samples
    if getattr(args, "step_batch_size_schedule", None) is None:
        return max(0, args.train_samples - consumed) // args.global_batch_size
    iterations, samples = 0, consumed
    while samples < args.train_samples:
        samples += _batch_at(samples)
        iterations += 1
    update_num_microbatches(consumed, consistency_check=False)
    return iterations


def num_train_samples(args: Namespace) -> int:
    """Samples that the training set must have: consumed ones and those of the remaining steps.

    The number of a run without a resume is kept if it is large enough: the shuffle depends on it.
    """
    consumed, iteration = args.consumed_train_samples, getattr(args, "iteration", 0) or 0
    wanted = (
        args.train_samples if counts_samples(args) else args.train_iters * args.global_batch_size
    )
    if getattr(args, "step_batch_size_schedule", None) is not None:
        for start, samples in ((0, 0), (iteration, consumed)):
            for _ in range(start, args.train_iters):
                samples += _batch_at(samples)
            wanted = max(wanted, samples)
        update_num_microbatches(consumed, consistency_check=False)
    elif not counts_samples(args):
        remaining = max(0, args.train_iters - iteration)
        wanted = max(wanted, consumed + remaining * args.global_batch_size)
    # The data loader rejects a set without unconsumed samples, also in a finished run.
    return max(wanted, consumed + 1)


def num_valid_samples(args: Namespace, wanted: int) -> int:
    """Samples that a validation set must have.

    Args:
        wanted: samples of all evaluations of this command line.
    Returns:
        `wanted`, or more if earlier starts drew more with another --eval-interval or --eval-iters.
    """
    if args.full_validation or args.skip_train or not args.eval_interval:
        return wanted
    done = (getattr(args, "iteration", 0) or 0) // args.eval_interval
    # One more at the end of the run.
    left = max(0, args.train_iters // args.eval_interval - done) + 1
    batch = getattr(args, "eval_global_batch_size", args.global_batch_size)
    return max(wanted, args.consumed_valid_samples + left * args.eval_iters * batch)


def _batch_at(samples: int) -> int:
    update_num_microbatches(samples, consistency_check=False)
    return get_current_global_batch_size()


def _resume_tokens(saved_args: Namespace, args: Namespace) -> None:
    """Set `args.earlier_samples` and `args.earlier_tokens`, consumed by earlier starts.

    An earlier start may have had another sequence length.
    """
    saved_length = getattr(saved_args, "seq_length", None) or args.seq_length
    args.earlier_samples = args.consumed_train_samples
    args.earlier_tokens = consumed_tokens(saved_args, args.consumed_train_samples, saved_length)


def consumed_tokens(args: Namespace, samples: int, seq_length: Optional[int] = None) -> int:
    """Tokens in the first `samples` samples of a run.

    Args:
        args: arguments of the run, or those of a checkpoint.
        samples: consumed_train_samples, now or at a later step.
        seq_length: args.seq_length by default.
    """
    earlier = getattr(args, "earlier_samples", 0)
    length = args.seq_length if seq_length is None else seq_length
    return getattr(args, "earlier_tokens", 0) + (samples - earlier) * length
