# Copyright (c) 2026, the megatron-core gptoss authors.

"""Compare a run with its reference."""

import math
import re
from dataclasses import dataclass
from typing import Iterator

import torch

from tests.fuzz.case import Problem
from tests.fuzz.rank import RankRecord


@dataclass(frozen=True)
class Tolerance:
    """Relative; of tensors over their largest element, or in bf16 of norms."""

    loss: float
    norm: float
    tensor: float


# Additions in another order differ by 1e-7 a step; AdamW's eps of 1e-4 keeps that from growing.
FP32 = Tolerance(loss=3e-5, norm=2e-4, tensor=1e-3)
# Another split of a sum rounds elsewhere: 2^-9 a value.
BF16 = Tolerance(loss=2e-2, norm=8e-2, tensor=0.2)


@dataclass
class Run:
    """A run over all of its ranks.

    Attributes:
        steps: of the last rank, which holds the losses.
        tensors: {key: unsharded tensor} of the last checkpoint, model and optimizer.
    """

    steps: list[dict]
    evaluation: dict
    samples: dict[int, set]
    tensors: dict[str, torch.Tensor]


def run_of(records: list[RankRecord], tensors: dict) -> Run:
    """Merge the records of all ranks."""
    samples: dict[int, set] = {}
    for record in records:
        for step, digests in record.samples.items():
            samples.setdefault(step, set()).update(digests)
    last = records[-1]
    return Run(last.steps, last.evaluation, samples, tensors)


def normalised(entries: dict) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, under names that do not depend on the layout."""
    found = {}
    for name, value in entries.items():
        if not isinstance(value, torch.Tensor) or "_extra_state" in name or "rng" in name:
            continue
        name = re.sub(r"chained_\d+\.", "", name)
        name = name.replace(".fp32_param.", ".param.")
        found[name] = value
    return found


def differences(run: Run, reference: Run, problem: Problem, first: int = 1) -> Iterator[str]:
    """One line for each kind of difference from the reference, largest first.

    Args:
        first: the first step of the run; those before are another run's.
    """
    tolerance = BF16 if problem.dtype == "bf16" else FP32
    expected = [step for step in reference.steps if step["iteration"] >= first]
    if [s["iteration"] for s in run.steps] != [s["iteration"] for s in expected]:
        yield f"steps {[s['iteration'] for s in run.steps]}, not {[s['iteration'] for s in expected]}"
        return
    for step, digests in reference.samples.items():
        if (step >= first or not step) and run.samples.get(step) != digests:
            yield f"other samples in step {step}"
    for found, wanted in zip(run.steps, expected):
        at = f"at step {found['iteration']}"
        yield from _losses(f"loss {at}", found["losses"], wanted["losses"], tolerance.loss)
        yield from _number(
            f"gradient norm {at}",
            {"norm": found["grad_norm"] or 0.0},
            {"norm": wanted["grad_norm"] or 0.0},
            tolerance.norm,
        )
        for key in ("learning_rate", "consumed_samples", "skipped_iterations"):
            if found[key] != wanted[key]:
                yield f"{key} {at}: {found[key]}, not {wanted[key]}"
    yield from _losses("evaluation", run.evaluation, reference.evaluation, tolerance.loss)
    yield from _tensors(run.tensors, reference.tensors, problem, tolerance.tensor)


def _losses(what: str, found: dict, wanted: dict, limit: float) -> Iterator[str]:
    # Where no token counts, as with documents of a single one and --eod-mask-loss, both are NaN.
    counted = [
        {name: value for name, value in losses.items() if not math.isnan(value)}
        for losses in (found, wanted)
    ]
    yield from _number(what, *counted, limit)


def _number(what: str, found: dict, wanted: dict, limit: float) -> Iterator[str]:
    if found.keys() != wanted.keys():
        yield f"{what}: {sorted(found)}, not {sorted(wanted)}"
    for name in found.keys() & wanted.keys():
        error = abs(found[name] - wanted[name]) / max(abs(wanted[name]), 1e-6)
        if not error <= limit:
            yield f"{what}: {name} {found[name]:.7g}, not {wanted[name]:.7g} ({error:.1e})"


def _tensors(found: dict, wanted: dict, problem: Problem, limit: float) -> Iterator[str]:
    # Without a master copy the optimizer has no parameters of its own.
    keys = {key for key in found if not key.startswith("optimizer.state.param.")}
    expected = {key for key in wanted if not key.startswith("optimizer.state.param.")}
    if keys != expected:
        missing, more = sorted(expected - keys), sorted(keys - expected)
        yield f"tensors missing {missing[:3]} ({len(missing)}), added {more[:3]} ({len(more)})"
    worst = []
    sizes = _sizes(wanted) if problem.dtype == "bf16" else {}
    for key in found:
        other = wanted.get(key)
        if other is None and key.startswith("optimizer.state.param."):
            other = wanted.get(key.removeprefix("optimizer.state.param."))
        if other is None:
            continue
        error = tensor_error(found[key], other, sizes.get(_family(key)))
        if not error <= limit:
            worst.append((error, key))
    for error, key in sorted(worst, reverse=True)[:3]:
        yield f"{key}: differs by {error:.1e} of its largest ({len(worst)} of {len(found)} tensors)"


def tensor_error(
    found: torch.Tensor, wanted: torch.Tensor, family_norm: float | None = None
) -> float:
    """Largest difference over the largest element; inf where shapes differ.

    Args:
        family_norm: given for bf16: the norms count then, and a difference that is small next to
            all tensors of the kind is small. A sink's gradient is a sum that nearly cancels.
    """
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.double(), wanted.double()
    if family_norm is not None:
        floor = max(wanted.norm().item(), 0.05 * family_norm)
        return (found - wanted).norm().item() / max(floor, 1e-12)
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)).item()


def _family(key: str) -> str:
    """'exp_avg' of 'optimizer.state.exp_avg.decoder...', '' of the model's own tensors."""
    return key.split(".")[2] if key.startswith("optimizer.state.") else ""


def _sizes(tensors: dict) -> dict[str, float]:
    squares: dict[str, float] = {}
    for key, value in tensors.items():
        family = _family(key)
        squares[family] = squares.get(family, 0.0) + value.double().square().sum().item()
    return {family: total**0.5 for family, total in squares.items()}
