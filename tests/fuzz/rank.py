# Copyright (c) 2026, the megatron-core gptoss authors.

"""Run pretrain_gpt_oss.py in this rank, and record what it reports."""

import contextlib
import hashlib
import io
import logging
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field

from megatron.gpt_oss.errors import RunError, UsageError
from megatron.gpt_oss.presets import PRESETS, Preset


@dataclass
class RankRecord:
    """What a rank recorded of a run.

    Attributes:
        refused: the sentence with which the run was refused, or ''.
        failed: the traceback of anything else that ended it, or ''.
        steps: the step callbacks' dictionaries, each with iteration, losses, grad_norm, ...
        evaluation: losses of the validation set after the last step.
        samples: {step: hashes of the samples read in it}; step 0 is the evaluation.
        batches: with `keep_batches`, what the first step read.
    """

    refused: str = ""
    failed: str = ""
    steps: list = field(default_factory=list)
    evaluation: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)
    batches: list = field(default_factory=list)


def train(argv: list[str], preset: Preset, keep_batches: bool = False) -> RankRecord:
    """Run main(argv) as a separate process would.

    Args:
        preset: known to the command line as --preset fuzz.
    """
    from megatron.gpt_oss.training import pretrain as run
    from megatron.training import step_callbacks
    from megatron.training.training import set_startup_timestamps

    record = RankRecord()
    PRESETS[preset.name] = preset
    step_callbacks.clear()
    step_callbacks.subscribe(
        step_callbacks.TrainingLogged, lambda event: record.steps.append(vars(event))
    )
    step_callbacks.subscribe(
        step_callbacks.SetEvaluated, lambda event: record.evaluation.update(event.losses)
    )
    set_startup_timestamps(program_start=time.time())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    sys.argv = ["pretrain_gpt_oss.py", *argv]  # parts of Megatron parse it again
    forward_step = run.forward_step
    run.forward_step = _recorded(forward_step, record, keep_batches)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            run.main(argv)
    except (UsageError, RunError) as error:
        record.refused = str(error)
    except BaseException as error:  # SystemExit too; the ranks are used again
        if not isinstance(error, SystemExit) or error.code:
            record.failed = traceback.format_exc()
    finally:
        logging.disable(logging.NOTSET)
        run.forward_step = forward_step
        step_callbacks.clear()
        PRESETS.pop(preset.name)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return record


def _recorded(forward_step, record: RankRecord, keep_batches: bool):
    from megatron.training import get_args

    def recorded(data_iterator, model):
        step = get_args().curr_iteration + 1 if model.training else 0
        reader = _Reader(data_iterator, record, step, keep_batches)
        return forward_step(reader, model)

    return recorded


class _Reader:
    """A data iterator that records the batches."""

    def __init__(self, iterator, record: RankRecord, step: int, keep_batches: bool):
        self._iterator, self._record, self._step = iterator, record, step
        self._keep = keep_batches and step == 1

    def __next__(self) -> dict:
        batch = next(self._iterator)
        for row in range(len(batch["tokens"])):
            parts = (batch[key][row].numpy().tobytes() for key in ("tokens", "labels", "loss_mask"))
            digest = hashlib.sha256(b"".join(parts)).hexdigest()
            self._record.samples.setdefault(self._step, set()).add(digest)
        if self._keep:
            self._record.batches.append({k: v for k, v in batch.items() if v is not None})
        return batch
