# Copyright (c) 2026, the megatron-core gptoss authors.

"""Where a run stands: in its learning-rate schedule, its samples and its tokens.

The schedule in force is the command line's, evaluated where the run stands: at its step where the
command line counts in iterations, at the samples that it consumed where it counts in samples. Steps
whose update was skipped do not count. With --use-checkpoint-opt-param-scheduler the schedule of the
checkpoint is kept instead.

Upstream's `OptimizerParamScheduler` has one counter, in samples, for both. In a run that counts in
iterations every step adds `args.global_batch_size` to it, whatever the batch of the step was: its
lengths are iterations times that number.
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
from .saved_schedule import ADDED, SavedSchedule, holds_optimizer, rate_word
from .utils import print_rank_0

# ---------------------------------------------------------------------------------------------
# The counter.
# ---------------------------------------------------------------------------------------------


def counts_samples(args: Namespace) -> bool:
    """Whether the command line counts in samples; `train_iters` is then derived."""
    return getattr(args, 'train_samples', None) is not None


def steps_per_iteration(scheduler: OptimizerParamScheduler, args: Namespace) -> Optional[int]:
    """What an iteration adds to the scheduler's counter; None for the samples of its batch."""
    own = None if counts_samples(args) else args.global_batch_size
    return getattr(scheduler, 'steps_per_iteration', own)


def increment(scheduler: OptimizerParamScheduler, args: Namespace, batch_size: int) -> int:
    """For `scheduler.step` after an update.

    Args:
        batch_size: samples of this step.
    """
    if not isinstance(scheduler, OptimizerParamScheduler):
        return batch_size
    steps = steps_per_iteration(scheduler, args)
    return batch_size if steps is None else steps


def state_dict(scheduler: OptimizerParamScheduler, args: Namespace) -> Dict[str, Any]:
    """Upstream's, and what a checkpoint needs besides to tell its rate at any step."""
    state = scheduler.state_dict()
    if not isinstance(scheduler, OptimizerParamScheduler):
        return state
    state.update({name: getattr(scheduler, name) for name in ADDED})
    state['steps_per_iteration'] = steps_per_iteration(scheduler, args)
    return state


# ---------------------------------------------------------------------------------------------
# After a load.
# ---------------------------------------------------------------------------------------------


def without_param_groups(sharded_state_dict: Dict[str, Any]) -> None:
    """Let a checkpoint's parameter groups be read as they are, whatever their number.

    Merged into the state dict to load, item by item, they would have to be as many as this run's.
    The sharded state dict is changed in place.
    """
    for value in list(sharded_state_dict.values()):
        if isinstance(value, dict):
            value.pop('param_groups', None)
            without_param_groups(value)


def resume(
    scheduler: OptimizerParamScheduler, state: Dict[str, Any], iteration: int, args: Namespace
) -> None:
    """Put the scheduler where a run stands that resumes, and say what changes.

    Called on every rank once the optimizer's state is loaded.

    Args:
        state: the loaded checkpoint. Its 'args' are those of the command that wrote it, and
            'opt_param_scheduler' is absent with --no-save-optim.
        iteration: of the checkpoint. `args.consumed_train_samples` is restored already.
    Raises:
        ScheduleError: --use-checkpoint-opt-param-scheduler, and the checkpoint has no schedule or
            other parameter groups.
    """
    saved_args = state.get('args') or Namespace()
    _resume_tokens(saved_args, args)
    if not isinstance(scheduler, OptimizerParamScheduler):
        if holds_optimizer(state) and not args.no_load_optim:
            scheduler.load_state_dict(state['opt_param_scheduler'])
        return
    if counts_samples(args):
        args.train_iters = _iterations_left(args) + iteration
    saved = SavedSchedule(scheduler, state, saved_args, iteration, args)
    command = copy.copy(scheduler)
    command.steps_per_iteration = steps_per_iteration(scheduler, args)
    now = f'learning rate at step {iteration + 1}: {rate_word(saved.rate_by(command))} by this command'
    kept = scheduler.use_checkpoint_opt_param_scheduler
    if kept:
        saved.put_into(scheduler)
        now = (
            f"learning rate at step {iteration + 1}: {rate_word(saved.rate())} by the checkpoint's "
            f'schedule, which is kept; {rate_word(saved.rate_by(command))} by this command'
        )
    elif saved.scheduler is not None:
        now += f", {rate_word(saved.rate())} by the checkpoint's schedule"
    scheduler.num_steps = saved.position(steps_per_iteration(scheduler, args), kept)
    scheduler.step(0)
    changes = saved.changes(command, kept)
    restart = _why_moments_restart(state, args)
    if restart:
        now += f"; the optimizer's moments restart from zero ({restart})"
    if changes:
        now += f" ({'; '.join(changes)})"
    if changes or restart:
        print_rank_0(f'> {now}')
        step_callbacks.publish(step_callbacks.ScheduleChanged(iteration, now))


def _why_moments_restart(state: Dict[str, Any], args: Namespace) -> str:
    if args.no_load_optim:
        return '--no-load-optim'
    return '' if holds_optimizer(state) else 'the checkpoint was saved with --no-save-optim'


# ---------------------------------------------------------------------------------------------
# Samples and tokens.
# ---------------------------------------------------------------------------------------------


def _iterations_left(args: Namespace) -> int:
    """Of a run that counts in samples, from where it stands; a last incomplete batch is left out."""
    consumed = args.consumed_train_samples
    if getattr(args, 'step_batch_size_schedule', None) is None:
        return max(0, args.train_samples - consumed) // args.global_batch_size
    iterations, samples = 0, consumed
    while samples < args.train_samples:
        samples += _batch_at(samples)
        iterations += 1
    update_num_microbatches(consumed, consistency_check=False)
    return iterations


def num_train_samples(args: Namespace) -> int:
    """Samples that the training set must have: those consumed, and those of the steps to come.

    As many as without a resume where these are enough, for the shuffle depends on the number.
    """
    consumed, iteration = args.consumed_train_samples, getattr(args, 'iteration', 0) or 0
    wanted = (
        args.train_samples if counts_samples(args) else args.train_iters * args.global_batch_size
    )
    if getattr(args, 'step_batch_size_schedule', None) is not None:
        for start, samples in ((0, 0), (iteration, consumed)):
            for _ in range(start, args.train_iters):
                samples += _batch_at(samples)
            wanted = max(wanted, samples)
        update_num_microbatches(consumed, consistency_check=False)
    elif not counts_samples(args):
        remaining = max(0, args.train_iters - iteration)
        wanted = max(wanted, consumed + remaining * args.global_batch_size)
    # A data loader refuses a set of which nothing is left, though a finished run asks for nothing.
    return max(wanted, consumed + 1)


def num_valid_samples(args: Namespace, wanted: int) -> int:
    """Samples that a validation set must have.

    Args:
        wanted: of all evaluations of this command line.
    Returns:
        More where earlier starts have drawn more, by another --eval-interval or --eval-iters.
    """
    if args.full_validation or args.skip_train or not args.eval_interval:
        return wanted
    done = (getattr(args, 'iteration', 0) or 0) // args.eval_interval
    # One at the end of the run besides.
    left = max(0, args.train_iters // args.eval_interval - done) + 1
    batch = getattr(args, 'eval_global_batch_size', args.global_batch_size)
    return max(wanted, args.consumed_valid_samples + left * args.eval_iters * batch)


def _batch_at(samples: int) -> int:
    update_num_microbatches(samples, consistency_check=False)
    return get_current_global_batch_size()


def _resume_tokens(saved_args: Namespace, args: Namespace) -> None:
    """Remember what was consumed at the sequence lengths of earlier starts."""
    saved_length = getattr(saved_args, 'seq_length', None) or args.seq_length
    args.earlier_samples = args.consumed_train_samples
    args.earlier_tokens = consumed_tokens(saved_args, args.consumed_train_samples, saved_length)


def consumed_tokens(args: Namespace, samples: int, seq_length: Optional[int] = None) -> int:
    """Tokens in the first `samples` samples of a run.

    Args:
        args: of the run, or those of a checkpoint.
        samples: consumed_train_samples, now or at a later step.
        seq_length: args.seq_length by default.
    """
    earlier = getattr(args, 'earlier_samples', 0)
    length = args.seq_length if seq_length is None else seq_length
    return getattr(args, 'earlier_tokens', 0) + (samples - earlier) * length
