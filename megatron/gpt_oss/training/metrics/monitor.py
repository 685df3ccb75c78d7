# Copyright (c) 2026, the megatron-core gptoss authors.
"""--monitor-interval and --sample-interval: expert load, norms and samples during training."""

from argparse import Namespace
from dataclasses import replace

import torch

from megatron.gpt_oss.data.chat.harmony import as_prompt
from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer
from megatron.gpt_oss.training.metrics.log import TrainingLog
from megatron.gpt_oss.training.metrics.module_norms import module_norms
from megatron.gpt_oss.training.metrics.router_load import RouterLoad
from megatron.training.step_callbacks import GradientsReady, StepEnded, subscribe


class Monitor:
    """Subscribes to events of the training loop on every rank; the last rank logs.

    Args:
        args: Megatron's arguments.
        log: the log on the last rank; None on the others.
    """

    def __init__(self, args: Namespace, log: TrainingLog | None):
        self._args = args
        self._log = log
        if args.monitor_interval:
            self._load = RouterLoad(
                args.num_layers,
                args.num_experts,
                self._is_monitored,
                args.expert_model_parallel_size,
            )
            subscribe(GradientsReady, self.monitor)
        if args.sample_interval:
            self._tokenizer = load_text_tokenizer(args.tokenizer_model)
            self._prompt = args.sample_prompt
            if args.sft:  # an answer in the harmony format, with its special tokens
                tokenizer = load_text_tokenizer(args.tokenizer_model, "<|return|>")
                self._tokenizer = replace(tokenizer, shows_special=True)
                self._prompt = as_prompt(args.sample_prompt)
            subscribe(StepEnded, self.sample)

    def watch(self, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Hook for `GPTModelConfig.pre_wrap_hooks`: register forward hooks on the routers."""
        if self._args.monitor_interval:
            self._load.watch(model)
        return model

    def monitor(self, event: GradientsReady) -> None:
        """Log expert load and norms every --monitor-interval steps. Collective."""
        if event.iteration % self._args.monitor_interval:
            return
        load, norms = self._load.take(), module_norms(event.model)
        if self._log is not None:
            self._log.experts(event.iteration, load)
            self._log.norms(event.iteration, norms)

    def sample(self, event: StepEnded) -> None:
        """Log a generated sample every --sample-interval steps. Collective."""
        from megatron.gpt_oss.training.metrics.live_sample import sample_live

        args = self._args
        if event.iteration % args.sample_interval:
            return
        text = sample_live(
            event.model,
            event.optimizer,
            self._tokenizer,
            self._prompt,
            args.sample_tokens,
            args.sample_temperature,
            args.seed,
        )
        if self._log is not None:
            self._log.sample(event.iteration, args.sample_prompt, text)

    def _is_monitored(self) -> bool:
        return (self._args.curr_iteration + 1) % self._args.monitor_interval == 0
