# Copyright (c) 2026, the megatron-core gptoss authors.

"""Events of upstream's training loop, for an entry script that subscribes to them.

    step_callbacks.subscribe(step_callbacks.TrainingLogged, print_one_line)
    step_callbacks.subscribe(step_callbacks.CheckpointSaved, link_best)
    step_callbacks.silence_upstream_log()
    pretrain(...)

Callbacks run on every rank, in the order of subscription. An exception in a callback ends the run.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Type, TypeVar

import torch

from megatron.core import device_utils

Event = TypeVar("Event")

_callbacks: Dict[type, List[Callable[[Any], None]]] = defaultdict(list)
_upstream_log_silenced = False


@dataclass(frozen=True)
class GradientsReady:
    """In every iteration, between backward and update.

    The gradients are those of the global batch, reduced over all ranks and not clipped yet. With
    --use-distributed-optimizer a rank holds its shard of them.

    Attributes:
        iteration: from 1.
        model: this rank's model chunks, wrapped by DistributedDataParallel.
    """

    iteration: int
    model: List[torch.nn.Module]


@dataclass(frozen=True)
class StepEnded:
    """At the end of every iteration: after logging and evaluation, before a checkpoint is saved.

    Attributes:
        iteration: from 1.
        model: this rank's model chunks, wrapped by DistributedDataParallel.
        optimizer: Megatron's optimizer.
    """

    iteration: int
    model: List[torch.nn.Module]
    optimizer: Any


@dataclass(frozen=True)
class TrainingLogged:
    """At the end of every --log-interval iterations.

    Attributes:
        losses: mean over the interval's iterations that were not skipped, by name; empty on ranks
            outside the last pipeline stage.
        grad_norm: None without gradient clipping.
        elapsed_per_iteration: seconds, mean over the interval.
        consumed_samples: since the start of training.
        batch_size: samples.
        tokens_in_batch: of the last iteration; without padding in packed batches.
        squared_lengths_in_batch: sum of the squared document lengths of the last iteration's packed
            batches, over all ranks; None where batches are not packed.
        skipped_iterations, nan_iterations: within the interval.
        peak_memory: bytes on this rank: PyTorch's CUDA allocator, or the process on CPU.
    """

    iteration: int
    train_iters: int
    losses: Dict[str, float]
    learning_rate: Optional[float]
    grad_norm: Optional[float]
    elapsed_per_iteration: float
    consumed_samples: int
    batch_size: int
    tokens_in_batch: int
    squared_lengths_in_batch: Optional[float]
    skipped_iterations: int
    nan_iterations: int
    loss_scale: float
    peak_memory: int = field(default_factory=device_utils.max_memory_allocated)


@dataclass(frozen=True)
class SetEvaluated:
    """After a validation or test set is evaluated.

    Attributes:
        prefix: for example 'iteration 10 on validation set'.
        name: '', or the name or number of one of several validation sets.
        losses: by name; empty on ranks outside the last pipeline stage.
        consumed_samples: training samples so far.
    """

    iteration: int
    prefix: str
    name: str
    losses: Dict[str, float]
    consumed_samples: int


@dataclass(frozen=True)
class CheckpointSaved:
    """When a checkpoint is complete and the tracker file names it.

    With --async-save this is after the background write has been finalized.

    Attributes:
        checkpoint: directory of this checkpoint.
        blocking_seconds: for which the save blocked training on this rank.
        background_seconds: of this rank's background write; 0 without one.
    """

    iteration: int
    save_dir: str
    checkpoint: str
    blocking_seconds: float
    background_seconds: float


@dataclass(frozen=True)
class CheckpointWaits:
    """When a save waits because the previous checkpoint is still being written.

    Attributes:
        waits_for: iteration of the previous checkpoint.
    """

    iteration: int
    waits_for: Optional[int]


@dataclass(frozen=True)
class ScheduleChanged:
    """When a resumed run trains by other values than its checkpoint.

    Attributes:
        iteration: of the checkpoint.
        line: learning rate of the next step, and what changed.
    """

    iteration: int
    line: str


def subscribe(event_type: Type[Event], callback: Callable[[Event], None]) -> None:
    """Call `callback` with each event of this type."""
    _callbacks[event_type].append(callback)


def publish(event: Any) -> None:
    """Call the subscribers of an event. For the training loop."""
    for callback in _callbacks[type(event)]:
        callback(event)


def silence_upstream_log(silenced: bool = True) -> None:
    """Do not print upstream's own line per log interval, per evaluation and on memory."""
    global _upstream_log_silenced
    _upstream_log_silenced = silenced


def upstream_log_silenced() -> bool:
    """Whether silence_upstream_log() is in force."""
    return _upstream_log_silenced


def clear() -> None:
    """Remove all callbacks, and let upstream print again."""
    _callbacks.clear()
    silence_upstream_log(False)
