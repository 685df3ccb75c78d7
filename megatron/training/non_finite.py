# Copyright (c) 2026, the megatron-core gptoss authors.

"""Stops a run whose loss or gradient is not finite, and says where it began.

Every step's verdict is the norm of the gradients, which the optimizer reads back anyway before it
updates: one NaN or infinity anywhere, on any rank, makes it so (pipeline_parallel/schedules.py
turns a loss that is not finite into gradients that are not). The optimizer leaves the weights
alone, and train_step() asks here for the cause. Only then does looking closer cost anything: the
step is run once more on the same batch and random numbers, with hooks on every module and
parameter, and the ranks put together what each saw first.
"""

import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine

from .async_utils import maybe_finalize_async_save

# Of the reports of all ranks, the message shows so many.
MOST_RANKS_SHOWN = 8


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite; the message names step, rank and layer."""


class Sighting(NamedTuple):
    """The first tensor that was not finite, in one pass of one rank."""

    microbatch: int
    layer: float  # Of the whole model, from 0; -1 before the first, inf after the last.
    is_container: bool  # A module with parts, none of which was seen before.
    order: int  # How many tensors this rank had looked at.
    description: str


class Report(NamedTuple):
    """What one rank saw."""

    rank: int
    parameters: List[str]
    forward: Optional[Sighting]
    backward: Optional[Sighting]
    buckets: List[str]  # From the step itself, before the second pass.
    still_in_buckets: bool  # Whether the second pass left such buckets, too.
    largest_gradient: Tuple[float, str]


class Check:
    """One training step's means to find the cause.

    Args:
        iteration: steps done before this one.
        model: the model chunks of this rank.
        data_iterator: this rank's iterator, list of iterators, or None.
        forward_backward: called without arguments, runs the step's forward and backward passes.
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
        """Find what is not finite and raise; return if all is well after all.

        Collective over all ranks.

        Raises:
            NonFiniteError: on every rank, with the same message.
        """
        report = self._look()
        reports: List[Report] = [report] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, report)
        norm_is_finite = grad_norm is None or _is_finite(grad_norm)
        cause = describe(reports, norm_is_finite)
        if cause is None:
            return
        maybe_finalize_async_save(blocking=True)  # An earlier, good checkpoint.
        norm = '' if norm_is_finite else f' (norm of the gradients: {grad_norm})'
        raise NonFiniteError(
            f'Step {self.iteration + 1}: the loss or a gradient is not finite{norm}. {cause}\n'
            'The weights were not updated and no checkpoint was written. Start again to go on from '
            'the last checkpoint; --iterations-to-skip leaves out the batch of a step, and '
            '--no-check-for-nan-in-loss-and-grad leaves out every update that is not finite.'
        )

    def _look(self) -> Report:
        names = {}
        for chunk in self.model:
            names.update(global_names(chunk))
        buckets = _buckets_not_finite(self.model, names)
        parameters = [
            f'the parameter {names[parameter]} holds {count_not_finite(parameter)}'
            for chunk in self.model
            for parameter in chunk.parameters()
            if not _is_finite(parameter)
        ]
        watch = _Watch(self.model, names)
        try:
            self._run_again()
        finally:
            watch.remove()
        return Report(
            torch.distributed.get_rank(),
            parameters,
            watch.forward,
            watch.backward,
            buckets,
            bool(_buckets_not_finite(self.model, names)),
            watch.largest_gradient,
        )

    def _run_again(self) -> None:
        machine = get_rerun_state_machine()
        mode, state = machine.mode, machine.state
        if mode != RerunMode.DISABLED:  # Otherwise the batch was not kept: look at the next one.
            machine._restore_state()
            iterators = self.data_iterator
            for iterator in iterators if isinstance(iterators, list) else [iterators]:
                if iterator is not None:
                    iterator.rewind()
        # In this state the machine accepts calls of validate_result() and decides nothing.
        machine.mode = RerunMode.VALIDATE_RESULTS
        machine.state = RerunState.WILL_RERUN_FROM_CHECKPOINT
        try:
            for chunk in self.model:
                chunk.zero_grad_buffer()
            self.forward_backward()
        finally:
            machine.mode, machine.state = mode, state


def refuse_to_save(iteration: int, model: List[torch.nn.Module]) -> None:
    """Raise rather than let a checkpoint of weights that are not finite be written.

    Collective over all ranks, and one read-back of the device: for saves, not for steps.

    Raises:
        NonFiniteError: on every rank.
    """
    parameters = [parameter.detach() for chunk in model for parameter in chunk.parameters()]
    found: List[str] = []
    if parameters and not torch.stack([_is_finite_tensor(p) for p in parameters]).all():
        for chunk in model:
            found += [
                f'{name} holds {count_not_finite(parameter)}'
                for parameter, name in global_names(chunk).items()
                if isinstance(parameter, torch.nn.Parameter) and not _is_finite(parameter)
            ]
    everywhere: List[List[str]] = [found]
    if torch.distributed.is_initialized():
        everywhere *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, found)
    for rank, names in enumerate(everywhere):
        if names:
            maybe_finalize_async_save(blocking=True)  # An earlier, good checkpoint.
            raise NonFiniteError(
                f'Step {iteration}: weights are not finite after the update. Rank {rank}: '
                f'{_some(names)}. No checkpoint was written; start again to go on from the last.'
            )


# ---------------------------------------------------------------------------------------------
# Putting together what the ranks saw
# ---------------------------------------------------------------------------------------------


def describe(reports: List[Report], norm_is_finite: bool) -> Optional[str]:
    """The cause in words, its origin first; None if no rank saw anything."""
    if any(report.parameters for report in reports):
        seen = [
            f'Rank {report.rank}: {_some(report.parameters)}.'
            for report in reports
            if report.parameters
        ]
        first = _first_forward(reports)
        if first is not None:
            seen.append(f'In the forward pass: rank {first.rank}: {first.forward.description}.')
        return _lines(seen)
    origin = _first_forward(reports)
    if origin is not None:
        return _lines(_ordered(origin, reports, lambda report: report.forward))
    origin = _first_backward(reports)
    if origin is not None:
        return _lines(_ordered(origin, reports, lambda report: report.backward))
    hurt = [report for report in reports if report.buckets]
    if hurt and not any(report.still_in_buckets for report in reports):
        return _lines(
            [
                f'Rank {report.rank}: {_some(report.buckets)}. A second pass over the same batch was '
                'finite: suspect the hardware of this rank, or a race.'
                for report in hurt
            ]
        )
    if norm_is_finite:
        return None
    report = max(reports, key=lambda report: report.largest_gradient[0])
    value, name = report.largest_gradient
    return (
        f'Rank {report.rank}: each gradient is finite, but their norm is not; the largest is '
        f'{value:g}, of {name}.'
    )


def _first_forward(reports: List[Report]) -> Optional[Report]:
    # What one rank sends to another is seen there later, and in a module around the communication.
    return min(
        (report for report in reports if report.forward),
        key=lambda report: report.forward[:4],
        default=None,
    )


def _first_backward(reports: List[Report]) -> Optional[Report]:
    def key(report):
        seen = report.backward
        # An expert sends its input's gradient to other ranks, where it comes out of the dispatch.
        return seen.microbatch, -seen.layer, '.experts.' not in seen.description, seen.order

    return min((report for report in reports if report.backward), key=key, default=None)


def _ordered(origin: Report, reports: List[Report], sighting) -> List[str]:
    others = [report for report in reports if report is not origin and sighting(report)]
    return [f'Rank {origin.rank}: {sighting(origin).description}.'] + [
        f'Seen after it: rank {report.rank}: {sighting(report).description}.' for report in others
    ]


def _lines(lines: List[str]) -> str:
    if len(lines) > MOST_RANKS_SHOWN:
        lines = lines[:MOST_RANKS_SHOWN] + [f'And on {len(lines) - MOST_RANKS_SHOWN} more ranks.']
    return '\n'.join(lines)


def _some(items: List[str]) -> str:
    more = f'; and {len(items) - 3} more' if len(items) > 3 else ''
    return '; '.join(items[:3]) + more


# ---------------------------------------------------------------------------------------------
# Looking
# ---------------------------------------------------------------------------------------------


class _Watch:
    """Hooks on modules and parameters that note the first tensor that is not finite."""

    def __init__(self, model: List[torch.nn.Module], names: Dict[Any, str]):
        self.forward: Optional[Sighting] = None
        self.backward: Optional[Sighting] = None
        self.largest_gradient = (0.0, 'no parameter')
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
        for handle in self._handles:
            handle.remove()

    def _after_forward(self, module, inputs, output) -> None:
        if not torch.is_grad_enabled() and not module.training:
            return
        microbatch = self._calls[module] = self._calls.get(module, -1) + 1
        name = self._names[module]
        what = f'the output of {name}' if name else 'the output of the whole model, its loss'
        for tensor in _tensors(output):
            self._order += 1
            if self.forward is None and not _is_finite(tensor):
                is_container = next(module.children(), None) is not None
                where = f'{what} holds {count_not_finite(tensor)}, micro-batch {microbatch}'
                self.forward = Sighting(microbatch, _layer(name), is_container, self._order, where)
            if tensor.requires_grad and self.forward is None:
                tensor.register_hook(
                    lambda gradient, name=what, layer=_layer(name), microbatch=microbatch: (
                        self._see_gradient(gradient, name, layer, microbatch)
                    )
                )

    def _gradient_hook(self, parameter):
        name = self._names[parameter]

        def hook(gradient):
            if getattr(parameter, 'grad_added_to_main_grad', False):
                gradient = parameter.main_grad  # A fused kernel put it there; this is a dummy.
            count = self._backward_counts.get(parameter, 0)
            self._backward_counts[parameter] = count + 1
            self._see_gradient(gradient, name, _layer(name), count)
            largest = gradient.detach().abs().max().item() if gradient.numel() else 0.0
            if largest > self.largest_gradient[0]:
                self.largest_gradient = (largest, name)

        return hook

    def _see_gradient(self, gradient, name: str, layer: float, microbatch: int) -> None:
        self._order += 1
        if self.backward is None and not _is_finite(gradient):
            where = (
                f'the gradient of {name} holds {count_not_finite(gradient)}, '
                f'micro-batch {microbatch}; the forward pass was finite'
            )
            self.backward = Sighting(microbatch, layer, False, self._order, where)


def _buckets_not_finite(model: List[torch.nn.Module], names: Dict[Any, str]) -> List[str]:
    """Gradient buckets of the step itself that were not finite before they were reduced."""
    found = []
    for chunk in model:
        groups = getattr(chunk, 'bucket_groups', []) + getattr(
            chunk, 'expert_parallel_bucket_groups', []
        )
        for group in groups:
            for bucket, norm in zip(group.buckets, getattr(group, 'local_grad_norms', None) or []):
                if not _is_finite(norm):
                    parameters = [names[parameter] for parameter in bucket.params_list]
                    found.append(
                        f'the norm of the gradients of {parameters[0]} to {parameters[-1]} was '
                        f'{norm.item()} before they were reduced'
                    )
    return found


def global_names(chunk: torch.nn.Module) -> Dict[Any, str]:
    """Names of a chunk's modules and parameters as in the whole model.

    Layers are numbered from 0 over all pipeline stages, experts over all expert-parallel ranks.
    """
    layers, experts = {}, {}
    for name, module in chunk.named_modules():
        number = getattr(module, 'layer_number', None)
        if isinstance(number, int) and re.search(r'(^|\.)layers\.\d+$', name):
            layers[name] = number - 1
        if isinstance(getattr(module, 'local_experts', None), torch.nn.ModuleList):
            offset = parallel_state.get_expert_model_parallel_rank() * len(module.local_experts)
            experts[name + '.local_experts'] = offset

    def whole(name: str) -> str:
        for prefix, number in layers.items():
            if name == prefix or name.startswith(prefix + '.'):
                renamed = re.sub(r'\d+$', str(number), prefix)
                for start, offset in experts.items():
                    if name.startswith(start + '.'):
                        index, _, rest = name[len(start) + 1 :].partition('.')
                        name = f'{start}.{int(index) + offset}' + ('.' + rest if rest else '')
                        break
                name = renamed + name[len(prefix) :]
                break
        # The wrappers: DistributedDataParallel, Float16Module.
        return re.sub(r'^module(\.|$)', '', re.sub(r'^(module\.)+', '', name))

    names: Dict[Any, str] = {module: whole(name) for name, module in chunk.named_modules()}
    names.update({parameter: whole(name) for name, parameter in chunk.named_parameters()})
    return names


def count_not_finite(tensor: torch.Tensor) -> str:
    """E.g. '3 NaN and 1 inf among 640 values'."""
    num_nan = int(torch.isnan(tensor).sum())
    num_inf = int(torch.isinf(tensor).sum())
    kinds = [f'{count} {kind}' for count, kind in ((num_nan, 'NaN'), (num_inf, 'inf')) if count]
    return f'{" and ".join(kinds) or "nothing but finite"} among {tensor.numel()} values'


def _layer(name: str) -> float:
    match = re.search(r'(?:^|\.)layers\.(\d+)', name)
    if match:
        return int(match[1])
    return -1 if 'embedding' in name else float('inf')


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
