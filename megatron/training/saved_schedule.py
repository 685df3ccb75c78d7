# Copyright (c) 2026, the megatron-core gptoss authors.

"""Learning-rate schedule of a checkpoint: its rate at any step, and what this command changes."""

import copy
from argparse import Namespace
from typing import Any, Dict, List, Optional

from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

# Fields in upstream's state dict of a scheduler, and fields of the curve that it lacks.
_SAVED = (
    "max_lr lr_warmup_steps lr_decay_style lr_decay_steps min_lr start_wd end_wd wd_incr_style "
    "wd_incr_steps"
).split()
ADDED = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")
# Fields of a parameter group that belong to the schedule; the others belong to the optimizer.
_GROUP_RATES = ("max_lr", "min_lr", "start_wd", "end_wd", "wd_mult")
_LENGTHS = {
    "lr_warmup_steps": "warm-up",
    "lr_decay_steps": "decay",
    "wsd_decay_steps": "decay at the end",
    "wd_incr_steps": "weight decay",
}
_NAMES = {
    "max_lr": "lr",
    "min_lr": "min lr",
    "init_lr": "lr before warm-up",
    "lr_decay_style": "decay style",
    "lr_wsd_decay_style": "style of the decay at the end",
    "start_wd": "weight decay at the start",
    "end_wd": "weight decay",
    "wd_incr_style": "style of the weight decay",
}


class ScheduleError(ValueError):
    """The schedule of a checkpoint cannot be used; the message has the cause and a hint."""


def holds_optimizer(state: Dict[str, Any]) -> bool:
    """Whether a checkpoint was saved with optimizer state (without --no-save-optim)."""
    return not getattr(state.get("args"), "no_save_optim", False)


class SavedSchedule:
    """The schedule of a checkpoint, and the position of the run in it.

    Attributes:
        scheduler: has the checkpoint's values; None if the checkpoint has no schedule.
        groups: hyperparameters of the checkpoint's parameter groups, as a flat list.
    """

    def __init__(self, scheduler, state, saved_args, iteration: int, args: Namespace):
        self._args, self._saved_args, self._iteration = args, saved_args, iteration
        self._loaded_optimizer = holds_optimizer(state) and not args.no_load_optim
        self.groups = _param_groups(state.get("optimizer"))
        self.scheduler = None
        self._lag, self._counter = 0, None
        values = state.get("opt_param_scheduler", state.get("lr_scheduler"))
        if values is not None and "max_lr" in values:
            self._read(scheduler, values)

    def _read(self, scheduler, values: Dict[str, Any]) -> None:
        saved_args = self._saved_args
        in_samples = getattr(saved_args, "train_samples", None) is not None
        batch = getattr(saved_args, "global_batch_size", self._args.global_batch_size)
        unit = values.get("steps_per_iteration", None if in_samples else batch)
        self.scheduler = copy.copy(scheduler)
        self.scheduler.steps_per_iteration = unit
        for name in _SAVED:
            setattr(self.scheduler, name, values[name])
        wsd = getattr(saved_args, f"lr_wsd_decay_{'samples' if in_samples else 'iters'}", None)
        added = {
            "init_lr": getattr(saved_args, "lr_warmup_init", None) or 0.0,
            "wsd_decay_steps": None if wsd is None else wsd * (unit or 1),
            "lr_wsd_decay_style": getattr(saved_args, "lr_wsd_decay_style", None),
        }
        for name in ADDED:
            setattr(self.scheduler, name, values.get(name, added[name]))
        if getattr(self._args, "override_ckpt_iteration", None) is None:
            self._counter = values["num_steps"]
        # Skipped updates. Without 'steps_per_iteration' the unit of the counter is not known.
        if "steps_per_iteration" in values and self._counter is not None:
            reached = self._iteration if unit else getattr(saved_args, "consumed_train_samples", 0)
            self._lag = reached - self._counter // (unit or 1)

    def position(self, unit: Optional[int], kept: bool = False, iterations_ahead: int = 0) -> int:
        """The position of the run, in steps of a scheduler.

        Args:
            unit: scheduler steps of an iteration; None: the scheduler counts samples.
            kept: use the checkpoint's own counter.
            iterations_ahead: iterations after the checkpoint.
        """
        batch = get_current_global_batch_size() if unit is None else unit
        if kept and self._counter is not None:
            return self._counter + iterations_ahead * batch
        own = self.scheduler.steps_per_iteration if self.scheduler is not None else unit
        lag = self._lag if (own is None) == (unit is None) else 0
        if unit is None:
            return max(0, self._args.consumed_train_samples - lag + iterations_ahead * batch)
        return max(0, self._iteration - lag + iterations_ahead) * unit

    def rate_by(self, scheduler: OptimizerParamScheduler) -> float:
        """The rate that the log reports for the next step."""
        at = copy.copy(scheduler)
        kept = scheduler is self.scheduler
        at.num_steps = self.position(scheduler.steps_per_iteration, kept, iterations_ahead=1)
        return at.get_lr({})

    def rate(self) -> float:
        """The rate of the next step by the checkpoint's schedule."""
        return self.rate_by(self.scheduler)

    def apply_to(self, scheduler: OptimizerParamScheduler) -> None:
        """Set a scheduler to this schedule and to the rates of the checkpoint's parameter groups.

        Raises:
            ScheduleError: the checkpoint has no schedule, or another number of parameter groups.
        """
        flag = "--use-checkpoint-opt-param-scheduler"
        if self.scheduler is None:
            raise ScheduleError(
                f"{flag}: this checkpoint was saved without its schedule (--no-save-optim). Drop "
                "the flag: this command's schedule resumes at the checkpoint's step."
            )
        groups = scheduler.optimizer.param_groups
        if self.groups and len(groups) != len(self.groups):
            raise ScheduleError(
                f"{flag}: this checkpoint has {len(self.groups)} parameter groups, this command "
                f"{len(groups)}. Give the learning-rate multipliers that it was saved with, or "
                "drop the flag."
            )
        for index, group in enumerate(groups):
            if self.groups:
                saved = self.groups[index]
                group.update({name: saved[name] for name in _GROUP_RATES if name in saved})
                continue
            for name in ("max_lr", "min_lr"):  # the groups were not loaded: keep this run's factors
                own, then = getattr(scheduler, name), getattr(self.scheduler, name)
                group[name] = group[name] * then / own if group.get(name) and own else then
        for name in (*_SAVED, *ADDED, "steps_per_iteration"):
            setattr(scheduler, name, getattr(self.scheduler, name))

    def changes(self, command: OptimizerParamScheduler, kept: bool) -> List[str]:
        """Describe how schedule, batch size, sequence length and optimizer differ."""
        found = []
        if self.scheduler is not None:
            units = command.steps_per_iteration, self.scheduler.steps_per_iteration
            for name in (*_SAVED, *ADDED):
                values = getattr(command, name), getattr(self.scheduler, name)
                if name in _LENGTHS:
                    now, then = (_length(*pair) for pair in zip(values, units))
                    if not any(values):
                        continue
                    if name == "wd_incr_steps" and command.start_wd == command.end_wd:
                        continue
                else:
                    now, then = values
                if "wsd" in name and command.lr_decay_style != "WSD":
                    continue
                if name == "start_wd" and now == command.end_wd and then == self.scheduler.end_wd:
                    continue  # constant and equal
                if not _same(now, then):
                    label = _LENGTHS.get(name) or _NAMES[name]
                    found.append(f"{label} {_format(now)}, {_format(then)} in the checkpoint")
            if not found and not kept and not _same(self.rate_by(command), self.rate()):
                found.append("the checkpoint's counter is not at its step")
        for name, label in (
            ("global_batch_size", "global batch"),
            ("step_batch_size_schedule", "batch size schedule"),
            ("seq_length", "sequence length"),
        ):
            now = getattr(self._args, name, None)
            then = getattr(self._saved_args, name, now)
            if now != then:
                found.append(f"{label} {_format(now)}, {_format(then)} in the checkpoint")
        if self._loaded_optimizer:
            found += self._optimizer_changes(command.optimizer.param_groups)
        return found

    def _optimizer_changes(self, groups: List[Dict[str, Any]]) -> List[str]:
        if not groups or not self.groups:
            return []
        found = []
        for name in ("betas", "eps", "momentum"):
            now, then = groups[0].get(name), self.groups[0].get(name)
            if now is not None and then is not None and not _same(now, then):
                found.append(f"{name} {_format(now)}, {_format(then)} in the checkpoint")
        now, then = (
            sorted({_relative(g, part[0]) for g in part}) for part in (groups, self.groups)
        )
        if now != then:
            found.append(
                f"rates of the parameter groups, as multiples of the first, {_format(now)}, "
                f"{_format(then)} in the checkpoint"
            )
        return found


def _param_groups(optimizer_state: Any) -> List[Dict[str, Any]]:
    """The parameter groups in the loaded state of one or several optimizers, in their order."""
    if isinstance(optimizer_state, (list, tuple)):
        return [group for part in optimizer_state for group in _param_groups(part)]
    if not isinstance(optimizer_state, dict):
        return []
    if "param_groups" in optimizer_state:
        return list(optimizer_state["param_groups"])
    if "optimizer" in optimizer_state:
        return _param_groups(optimizer_state["optimizer"])
    parts = sorted(key for key in optimizer_state if isinstance(key, int))
    return [group for key in parts for group in _param_groups(optimizer_state[key])]


def _relative(group: Dict[str, Any], first: Dict[str, Any]) -> float:
    largest = first.get("max_lr")
    return float(f"{group.get('max_lr', largest) / largest:.4g}") if largest else 1.0


def _length(steps: Optional[float], unit: Optional[int]) -> Optional[str]:
    """Format a length of the schedule, e.g. '40 steps' or '1280 samples'."""
    if steps is None:
        return None
    return f"{steps:,.10g} samples" if unit is None else f"{steps / unit:,.10g} steps"


def _same(now: Any, then: Any) -> bool:
    if isinstance(now, float) and isinstance(then, (int, float)):
        return abs(now - then) <= 1e-12 * max(abs(now), abs(then))
    if isinstance(now, (list, tuple)) and isinstance(then, (list, tuple)):
        return len(now) == len(then) and all(map(_same, now, then))
    return now == then


def _format(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_format, value)) + ")"
    if isinstance(value, float):
        return format_rate(value, ".6g") if 0 < abs(value) < 1e-3 else f"{value:g}"
    return "none" if value is None else str(value)


def format_rate(value: float, mantissa_format: str = ".2f") -> str:
    """Format a learning rate, e.g. '9.75e-4'."""
    mantissa, exponent = f"{value:.6e}".split("e")
    return f"{float(mantissa):{mantissa_format}}e{int(exponent)}"
