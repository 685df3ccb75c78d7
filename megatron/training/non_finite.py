# Copyright (c) 2026, the megatron-core gptoss authors.

"""Stop a run whose loss or gradient is not finite, and report the first tensor that is not.

The gradient norm detects the problem, at no cost: the optimizer copies it to the CPU before each
update anyway. A NaN or infinity on any rank makes the norm non-finite, and
pipeline_parallel/schedules.py turns a non-finite loss into non-finite gradients. The optimizer then
skips the update, and train_step() calls `Check.stop`. It reruns the step on the same batch and RNG
state with hooks on every module and parameter, gathers the first non-finite tensor of each rank,
and raises.
"""

import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine

from .async_utils import maybe_finalize_async_save

# Ranks that the message shows.
MAX_RANKS_SHOWN = 8


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite; the message names step, rank and layer."""


class NonFiniteTensor(NamedTuple):
    """The first non-finite tensor in the forward or backward pass of one rank."""

    microbatch: int
    layer: float  # Global layer number from 0; -1 before the first layer, inf after the last.
    is_container: bool  # The module has children, and none of them was non-finite before.
    order: int  # Number of tensors that this rank checked before.
    description: str


class RankReport(NamedTuple):
    """What one rank found."""

    rank: int
    parameters: List[str]
    forward: Optional[NonFiniteTensor]
    backward: Optional[NonFiniteTensor]
    buckets: List[str]  # Non-finite gradient buckets of the step itself.
    still_in_buckets: bool  # Whether the rerun has non-finite buckets, too.
    largest_gradient: Tuple[float, str]


class Check:
    """Finds the cause of a non-finite gradient norm of one training step.

    Args:
        iteration: number of steps before this one.
        model: the model chunks of this rank.
        data_iterator: this rank's iterator, list of iterators, or None.
        forward_backward: called without arguments; runs the step's forward and backward passes.
    """

    def __init__(
        self,
        iteration: int,
        model: List[torch.nn.Module],
        data_iterator: Any,
        forward_backward: Callable[[], Any],
    ):
        self.iteration = iteration
        self.model = model
        self.data_iterator = data_iterator
        self.forward_backward = forward_backward

    def stop(self, grad_norm: Optional[float] = None) -> None:
        """Find the non-finite tensor and raise; return if every tensor and the norm are finite.

        Collective over all ranks.

        Args:
            grad_norm: gradient norm of the step; None if it was not computed.
        Raises:
            NonFiniteError: on every rank, with the same message.
        """
        report = self._rank_report()
        reports: List[RankReport] = [report] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, report)
        norm_is_finite = grad_norm is None or _is_finite(grad_norm)
        cause = describe(reports, norm_is_finite)
        if cause is None:
            return
        maybe_finalize_async_save(blocking=True)  # A checkpoint of an earlier step.
        norm = "" if norm_is_finite else f" (norm of the gradients: {grad_norm})"
        raise NonFiniteError(
            f"Step {self.iteration + 1}: the loss or a gradient is not finite{norm}. {cause}\n"
            "The weights were not updated and no checkpoint was written. Rerun the same command to "
            "resume from the last checkpoint; --iterations-to-skip skips the batch of a step, and "
            "--no-check-for-nan-in-loss-and-grad skips every non-finite update."
        )

    def _rank_report(self) -> RankReport:
        names = {}
        for chunk in self.model:
            names.update(global_names(chunk))
        buckets = _buckets_not_finite(self.model, names)
        parameters = [
            f"the parameter {names[parameter]} holds {count_not_finite(parameter)}"
            for chunk in self.model
            for parameter in chunk.parameters()
            if not _is_finite(parameter)
        ]
        hooks = _NonFiniteHooks(self.model, names)
        try:
            self._rerun_step()
        finally:
            hooks.remove()
        return RankReport(
            torch.distributed.get_rank(),
            parameters,
            hooks.forward,
            hooks.backward,
            buckets,
            bool(_buckets_not_finite(self.model, names)),
            hooks.largest_gradient,
        )

    def _rerun_step(self) -> None:
        machine = get_rerun_state_machine()
        mode, state = machine.mode, machine.state
        if mode != RerunMode.DISABLED:  # Otherwise the batch was not kept: the next one is used.
            machine._restore_state()
            iterators = self.data_iterator
            for iterator in iterators if isinstance(iterators, list) else [iterators]:
                if iterator is not None:
                    iterator.rewind()
        # In this state validate_result() accepts calls and triggers no rerun.
        machine.mode = RerunMode.VALIDATE_RESULTS
        machine.state = RerunState.WILL_RERUN_FROM_CHECKPOINT
        try:
            for chunk in self.model:
                chunk.zero_grad_buffer()
            self.forward_backward()
        finally:
            machine.mode, machine.state = mode, state


def refuse_to_save(iteration: int, model: List[torch.nn.Module]) -> None:
    """Raise if a weight is not finite, before a checkpoint is written.

    Collective over all ranks. Synchronises with the device once: for saves, not for every step.

    Raises:
        NonFiniteError: on every rank.
    """
    parameters = [parameter.detach() for chunk in model for parameter in chunk.parameters()]
    found: List[str] = []
    if parameters and not torch.stack([_is_finite_tensor(p) for p in parameters]).all():
        for chunk in model:
            found += [
                f"{name} holds {count_not_finite(parameter)}"
                for parameter, name in global_names(chunk).items()
                if isinstance(parameter, torch.nn.Parameter) and not _is_finite(parameter)
            ]
    everywhere: List[List[str]] = [found]
    if torch.distributed.is_initialized():
        everywhere *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, found)
    for rank, names in enumerate(everywhere):
        if names:
            maybe_finalize_async_save(blocking=True)  # A checkpoint of an earlier step.
            raise NonFiniteError(
                f"Step {iteration}: weights are not finite after the update. Rank {rank}: "
                f"{_some(names)}. No checkpoint was written. Rerun the same command to resume from "
                "the last one."
            )


def describe(reports: List[RankReport], norm_is_finite: bool) -> Optional[str]:
    """Describe the cause, starting with the rank of its origin; None if every rank is finite."""
    if any(report.parameters for report in reports):
        lines = [
            f"Rank {report.rank}: {_some(report.parameters)}."
            for report in reports
            if report.parameters
        ]
        first = _first_forward(reports)
        if first is not None:
            lines.append(f"In the forward pass: rank {first.rank}: {first.forward.description}.")
        return _lines(lines)
    origin = _first_forward(reports)
    if origin is not None:
        return _lines(_ordered(origin, reports, lambda report: report.forward))
    origin = _first_backward(reports)
    if origin is not None:
        return _lines(_ordered(origin, reports, lambda report: report.backward))
    affected = [report for report in reports if report.buckets]
    if affected and not any(report.still_in_buckets for report in reports):
        return _lines(
            [
                f"Rank {report.rank}: {_some(report.buckets)}. A rerun of the same batch was "
                "finite: suspect the hardware of this rank, or a race."
                for report in affected
            ]
        )
    if norm_is_finite:
        return None
    report = max(reports, key=lambda report: report.largest_gradient[0])
    value, name = report.largest_gradient
    return (
        f"Rank {report.rank}: each gradient is finite, but their norm is not; the largest is "
        f"{value:g}, of {name}."
    )


def _first_forward(reports: List[RankReport]) -> Optional[RankReport]:
    # A receiving rank detects the tensor later, in the module that contains the communication.
    return min(
        (report for report in reports if report.forward),
        key=lambda report: report.forward[:4],
        default=None,
    )


def _first_backward(reports: List[RankReport]) -> Optional[RankReport]:
    def key(report):
        found = report.backward
        # The gradient of an expert's input reaches other ranks through the backward of dispatch.
        return found.microbatch, -found.layer, ".experts." not in found.description, found.order

    return min((report for report in reports if report.backward), key=key, default=None)


def _ordered(origin: RankReport, reports: List[RankReport], found) -> List[str]:
    others = [report for report in reports if report is not origin and found(report)]
    return [f"Rank {origin.rank}: {found(origin).description}."] + [
        f"After it: rank {report.rank}: {found(report).description}." for report in others
    ]


def _lines(lines: List[str]) -> str:
    if len(lines) > MAX_RANKS_SHOWN:
        lines = lines[:MAX_RANKS_SHOWN] + [f"And on {len(lines) - MAX_RANKS_SHOWN} more ranks."]
    return "\n".join(lines)


def _some(items: List[str]) -> str:
    more = f"; and {len(items) - 3} more" if len(items) > 3 else ""
    return "; ".join(items[:3]) + more


class _NonFiniteHooks:
    """Hooks on modules and parameters that record the first non-finite tensor."""

    def __init__(self, model: List[torch.nn.Module], names: Dict[Any, str]):
        self.forward: Optional[NonFiniteTensor] = None
        self.backward: Optional[NonFiniteTensor] = None
        self.largest_gradient = (0.0, "no parameter")
        self._names = names
        self._order = 0
        self._calls: Dict[torch.nn.Module, int] = {}
        self._microbatch = 0
        self._backward_counts: Dict[torch.nn.Parameter, int] = {}
        self._handles = []
        for chunk in model:
            for module in chunk.modules():
                self._handles.append(module.register_forward_hook(self._after_forward))
            for parameter in chunk.parameters():
                if parameter.requires_grad:
                    hook = self._gradient_hook(parameter)
                    self._handles.append(parameter.register_hook(hook))

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _after_forward(self, module, inputs, output) -> None:
        if not torch.is_grad_enabled() and not module.training:
            return
        microbatch = self._calls[module] = self._calls.get(module, -1) + 1
        name = self._names[module]
        what = f"the output of {name}" if name else "the output of the model, the loss"
        for tensor in _tensors(output):
            self._order += 1
            if self.forward is None and not _is_finite(tensor):
                is_container = next(module.children(), None) is not None
                where = f"{what} holds {count_not_finite(tensor)}, micro-batch {microbatch}"
                self.forward = NonFiniteTensor(
                    microbatch, _layer(name), is_container, self._order, where
                )
            if tensor.requires_grad and self.forward is None:
                tensor.register_hook(
                    lambda gradient, name=what, layer=_layer(name), microbatch=microbatch: (
                        self._check_gradient(gradient, name, layer, microbatch)
                    )
                )

    def _gradient_hook(self, parameter):
        name = self._names[parameter]

        def hook(gradient):
            if getattr(parameter, "grad_added_to_main_grad", False):
                gradient = parameter.main_grad  # A fused kernel wrote it; `gradient` is a dummy.
            count = self._backward_counts.get(parameter, 0)
            self._backward_counts[parameter] = count + 1
            self._check_gradient(gradient, name, _layer(name), count)
            largest = gradient.detach().abs().max().item() if gradient.numel() else 0.0
            if largest > self.largest_gradient[0]:
                self.largest_gradient = (largest, name)

        return hook

    def _check_gradient(self, gradient, name: str, layer: float, microbatch: int) -> None:
        self._order += 1
        if self.backward is None and not _is_finite(gradient):
            where = (
                f"the gradient of {name} holds {count_not_finite(gradient)}, "
                f"micro-batch {microbatch}; the forward pass was finite"
            )
            self.backward = NonFiniteTensor(microbatch, layer, False, self._order, where)


def _buckets_not_finite(model: List[torch.nn.Module], names: Dict[Any, str]) -> List[str]:
    """Describe the gradient buckets that were not finite before the reduction."""
    found = []
    for chunk in model:
        groups = getattr(chunk, "bucket_groups", []) + getattr(
            chunk, "expert_parallel_bucket_groups", []
        )
        for group in groups:
            for bucket, norm in zip(group.buckets, getattr(group, "local_grad_norms", None) or []):
                if not _is_finite(norm):
                    parameters = [names[parameter] for parameter in bucket.params_list]
                    found.append(
                        f"the norm of the gradients of {parameters[0]} to {parameters[-1]} was "
                        f"{norm.item()} before they were reduced"
                    )
    return found


def global_names(chunk: torch.nn.Module) -> Dict[Any, str]:
    """Global names of a chunk's modules and parameters.

    Layers are numbered from 0 over all pipeline stages, experts over all expert-parallel ranks.

    Returns:
        {module or parameter: name}, without the prefixes of DDP and Float16Module.
    """
    layers, experts = {}, {}
    for name, module in chunk.named_modules():
        number = getattr(module, "layer_number", None)
        if isinstance(number, int) and re.search(r"(^|\.)layers\.\d+$", name):
            layers[name] = number - 1
        if isinstance(getattr(module, "local_experts", None), torch.nn.ModuleList):
            offset = parallel_state.get_expert_model_parallel_rank() * len(module.local_experts)
            experts[name + ".local_experts"] = offset

    def global_name(name: str) -> str:
        for prefix, number in layers.items():
            if name == prefix or name.startswith(prefix + "."):
                renamed = re.sub(r"\d+$", str(number), prefix)
                for start, offset in experts.items():
                    if name.startswith(start + "."):
                        index, _, rest = name[len(start) + 1 :].partition(".")
                        name = f"{start}.{int(index) + offset}" + ("." + rest if rest else "")
                        break
                name = renamed + name[len(prefix) :]
                break
        # The wrappers: DistributedDataParallel, Float16Module.
        return re.sub(r"^module(\.|$)", "", re.sub(r"^(module\.)+", "", name))

    names: Dict[Any, str] = {module: global_name(name) for name, module in chunk.named_modules()}
    names.update({parameter: global_name(name) for name, parameter in chunk.named_parameters()})
    return names


def count_not_finite(tensor: torch.Tensor) -> str:
    """Count the non-finite values, e.g. '3 NaN and 1 inf among 640 values'."""
    num_nan = int(torch.isnan(tensor).sum())
    num_inf = int(torch.isinf(tensor).sum())
    kinds = [f"{count} {kind}" for count, kind in ((num_nan, "NaN"), (num_inf, "inf")) if count]
    return f"{' and '.join(kinds) or 'no NaN or inf'} among {tensor.numel()} values"


def _layer(name: str) -> float:
    match = re.search(r"(?:^|\.)layers\.(\d+)", name)
    if match:
        return int(match[1])
    return -1 if "embedding" in name else float("inf")


def _tensors(value: Any) -> List[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _is_finite_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor).all()


def _is_finite(value: Any) -> bool:
    return bool(_is_finite_tensor(torch.as_tensor(value).detach()))
