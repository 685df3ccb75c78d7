# Copyright (c) 2026, the megatron-core gptoss authors.
"""What is looked at every --monitor-interval and --sample-interval steps."""

from argparse import Namespace

import torch

from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer
from megatron.gpt_oss.training.metrics.log import TrainingLog
from megatron.gpt_oss.training.metrics.module_norms import module_norms
from megatron.gpt_oss.training.metrics.router_load import RouterLoad
from megatron.training import step_callbacks


class Monitor:
    """Registers itself with `step_callbacks` on every rank; the last one writes.

    Args:
        args: Megatron's arguments.
        log: on the last rank; None on the others.
    """

    def __init__(self, args: Namespace, log: TrainingLog | None):
        self._args = args
        self._log = log
        if args.monitor_interval:
            self._load = RouterLoad(
                args.num_layers,
                args.num_experts,
                self._is_step_looked_at,
                args.expert_model_parallel_size,
            )
            step_callbacks.on_gradients_ready(self.look)
        if args.sample_interval:
            self._tokenizer = load_text_tokenizer(args.tokenizer_model)
            step_callbacks.on_step_ended(self.sample)

    def watch(self, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """A hook for `GPTModelConfig.pre_wrap_hooks`."""
        if self._args.monitor_interval:
            self._load.watch(model)
        return model

    def look(self, values: dict) -> None:
        """For `on_gradients_ready`."""
        if values["iteration"] % self._args.monitor_interval:
            return
        load, norms = self._load.take(), module_norms(values["model"])
        if self._log is not None:
            self._log.experts(values["iteration"], load)
            self._log.norms(values["iteration"], norms)

    def sample(self, values: dict) -> None:
        """For `on_step_ended`."""
        from megatron.gpt_oss.training.metrics.live_sample import sample_live

        args, step = self._args, values["iteration"]
        if step % args.sample_interval:
            return
        text = sample_live(
            values["model"],
            values["optimizer"],
            self._tokenizer,
            args.sample_prompt,
            args.sample_tokens,
            args.sample_temperature,
            args.seed,
        )
        if self._log is not None:
            self._log.sample(step, args.sample_prompt, text)

    def _is_step_looked_at(self) -> bool:
        return (self._args.curr_iteration + 1) % self._args.monitor_interval == 0
