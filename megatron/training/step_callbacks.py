# Copyright (c) 2026, the megatron-core gptoss authors.

"""Where an entry script registers what is to be called as upstream's training loop goes along.

    step_callbacks.on_training_log(print_one_line)
    step_callbacks.on_evaluation(write_validation_loss)
    step_callbacks.on_checkpoint_saved(link_best)
    step_callbacks.silence_upstream_log()
    pretrain(...)

Callbacks run on every rank, in the order of registration, and an exception of theirs ends the run.
With nothing registered the training loop computes nothing more than it did.
"""

from typing import Any, Callable, Dict, List

from megatron.core import device_utils

from .utils import print_rank_0

Callback = Callable[[Dict[str, Any]], None]

_gradients_ready: List[Callback] = []
_training_log: List[Callback] = []
_step_ended: List[Callback] = []
_evaluation: List[Callback] = []
_checkpoint_saved: List[Callback] = []
_checkpoint_waits: List[Callback] = []
_resumed: List[Callback] = []
_upstream_log_silenced = False


def on_gradients_ready(callback: Callback) -> None:
    """Call `callback` with one dictionary in every iteration, between backward and update.

    The gradients are those of the global batch, reduced over all ranks, not clipped yet; with
    --use-distributed-optimizer a rank holds its shard of them, see `module_norms`.

    Its keys:
        iteration: int, from 1. model: list of this rank's model chunks, in their wrappers.
    """
    _gradients_ready.append(callback)


def on_step_ended(callback: Callback) -> None:
    """Call `callback` with one dictionary at the end of every iteration.

    After its line is logged and the validation sets are evaluated, before a checkpoint is saved.

    Its keys:
        iteration: int, from 1. model: list of this rank's model chunks, in their wrappers.
        optimizer: Megatron's.
    """
    _step_ended.append(callback)


def on_training_log(callback: Callback) -> None:
    """Call `callback` with one dictionary at the end of every --log-interval iterations.

    Its keys:
        iteration, train_iters: int.
        losses: {name: float}, mean over the interval's iterations that were not skipped; empty on
            ranks that are not in the last pipeline stage.
        learning_rate: float. grad_norm: float, or None without gradient clipping.
        elapsed_per_iteration: seconds, mean over the interval.
        consumed_samples: int, since the start of training. batch_size: int, samples.
        tokens_in_batch: int, of the last iteration; padding is not counted in packed batches.
        squared_lengths_in_batch: float, of the last iteration: squared lengths of the documents of
            packed batches, summed over all ranks; None where batches are not packed.
        skipped_iterations, nan_iterations: int, within the interval.
        loss_scale: float.
        peak_memory: bytes on this rank: PyTorch's CUDA allocator, on the CPU the process.
    """
    _training_log.append(callback)


def on_evaluation(callback: Callback) -> None:
    """Call `callback` with one dictionary after each validation or test set is evaluated.

    Its keys:
        iteration: int. prefix: str, e.g. 'iteration 10 on validation set'.
        name: str, '' or the name or number of one of several validation sets.
        losses: {name: float}; empty on ranks that are not in the last pipeline stage.
        consumed_samples: int, training samples seen so far.
    """
    _evaluation.append(callback)


def on_checkpoint_saved(callback: Callback) -> None:
    """Call `callback` with one dictionary once a checkpoint is complete and recorded as the latest.

    With --async-save that is when the background write has been finalised.

    Its keys:
        iteration: int. save_dir: str. checkpoint: str, path of this checkpoint.
        seconds_held_up: float, for which the training stood still on this rank.
        seconds_in_background: float, of this rank's write beside the training; 0 without one.
    """
    _checkpoint_saved.append(callback)


def on_checkpoint_waits(callback: Callback) -> None:
    """Call `callback` with one dictionary when a save waits: the one before is still being written.

    Its keys:
        iteration: int. waits_for: int, iteration of the checkpoint that is being written.
    """
    _checkpoint_waits.append(callback)


def on_resumed(callback: Callback) -> None:
    """Call `callback` with one dictionary when a resumed run changes what its checkpoint trained by.

    Its keys:
        iteration: int, of the checkpoint. line: str, the rate of the next step and what changed.
    """
    _resumed.append(callback)


def silence_upstream_log(silenced: bool = True) -> None:
    """Do not print upstream's own line per log interval, per evaluation and on memory."""
    global _upstream_log_silenced
    _upstream_log_silenced = silenced


def upstream_log_silenced() -> bool:
    """Whether silence_upstream_log() is in force."""
    return _upstream_log_silenced


def clear() -> None:
    """Forget every callback, and let upstream print again."""
    for callbacks in (
        _gradients_ready,
        _training_log,
        _evaluation,
        _step_ended,
        _checkpoint_saved,
        _checkpoint_waits,
        _resumed,
    ):
        callbacks.clear()
    silence_upstream_log(False)


# ---------------------------------------------------------------------------------------------
# Called by the training loop.
# ---------------------------------------------------------------------------------------------


def gradients_ready(**values) -> None:
    """From train_step()."""
    for callback in _gradients_ready:
        callback(dict(values))


def step_ended(**values) -> None:
    """From post_training_step_callbacks()."""
    for callback in _step_ended:
        callback(dict(values))


def training_logged(**values) -> None:
    """From training_log(); adds what only a listener needs."""
    if not _training_log:
        return
    grad_norm = values['grad_norm']
    values.update(
        grad_norm=None if grad_norm is None else float(grad_norm),
        loss_scale=float(values['loss_scale']),
        tokens_in_batch=int(values['tokens_in_batch']),
        peak_memory=device_utils.max_memory_allocated(),
    )
    for callback in _training_log:
        callback(dict(values))


def evaluated(**values) -> None:
    """From evaluate_and_print_results(); the losses are still tensors."""
    if not _evaluation:
        return
    values['losses'] = {name: value.item() for name, value in values['losses'].items()}
    for callback in _evaluation:
        callback(dict(values))


def checkpoint_saved(**values) -> None:
    """From save_checkpoint()."""
    for callback in _checkpoint_saved:
        callback(dict(values))


def checkpoint_waits(**values) -> None:
    """From async_checkpoint.wait_for_previous()."""
    for callback in _checkpoint_waits:
        callback(dict(values))


def resumed(**values) -> None:
    """From run_position.resume(); upstream's own output has the line in any case."""
    print_rank_0(f'> {values["line"]}')
    for callback in _resumed:
        callback(dict(values))
