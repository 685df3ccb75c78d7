# Copyright (c) 2026, the megatron-core gptoss authors.

"""A few layers of gpt-oss with Megatron's own step, for the benchmarks: no files, no log."""

import gc
import os
import tempfile

import torch

from benchmarks.lib import timing
from megatron.core import device_utils, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.gpt_oss.layer_specs import model_config
from megatron.gpt_oss.presets import Preset
from megatron.gpt_oss.training.forward_step import losses_and_loss_func


def start_alone(backend: str | None = None) -> None:
    """Initialize the default process group with one process; the backend is the device's by default."""
    store = torch.distributed.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
    backend = backend or device_utils.default_backend()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


class Trainer:
    """A model and its optimizer over the ranks of the default process group.

    Args:
        preset: the model.
        cp, ep: context and expert parallel sizes.
        loss_chunk: tokens whose logits live at a time; 0 is all of them.
        gradients: 'fp32' or 'bf16', the dtype in which they are kept and reduced.
        optimizer: whether to make one (AdamW, its states split over the ranks).
        bf16: False trains in fp32, for tests on the CPU.
        overrides: Megatron arguments by dest, seq_length among them.
    """

    def __init__(
        self,
        preset: Preset,
        *,
        cp: int = 1,
        ep: int = 1,
        loss_chunk: int = 0,
        gradients: str = "fp32",
        optimizer: bool = True,
        bf16: bool = True,
        **overrides,
    ):
        self.preset, self.loss_chunk = preset, loss_chunk
        layout = dict(context_parallel_size=cp, expert_model_parallel_size=ep)
        parallel_state.initialize_model_parallel(**layout, expert_tensor_parallel_size=1)
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
        torch.manual_seed(1234)
        config = model_config(
            preset, **layout, expert_tensor_parallel_size=1, bf16=bf16, **overrides
        )
        config.finalize()
        self.model = config.get_builder_cls()(config).build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(),
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=gradients == "fp32", use_distributed_optimizer=optimizer
            ),
            data_parallel_random_init=False,
            **({} if bf16 else {"mixed_precision_wrapper": None}),
        )
        self.transformer = config.transformer
        self.transformer.finalize_model_grads_func = finalize_model_grads
        self.optimizer = None
        if optimizer:
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=1e-4,
                    weight_decay=0.1,
                    clip_grad=1.0,
                    bf16=bf16,
                    params_dtype=torch.bfloat16 if bf16 else torch.float32,
                    use_distributed_optimizer=True,
                ),
                self.model,
            )
            self.transformer.grad_scale_func = self.optimizer.scale_loss

    def zero_gradients(self) -> None:
        """Clear gradients, as Megatron does before the first micro-batch of a step."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def forward_backward(self, batch: dict) -> torch.Tensor:
        """Accumulate the gradients of one micro-batch.

        Returns:
            [2], this rank's: the sum of its tokens' losses, the number of these tokens.
        """
        micro_batch_size, length = batch["tokens"].shape
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter([batch]),
            model=self.model,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=micro_batch_size,
            forward_only=False,
        )
        return reports[0]["lm loss"]

    def _forward_step(self, data, model):
        group = parallel_state.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(next(data), is_hybrid_cp=False, cp_group=group)
        return losses_and_loss_func(
            model, batch, chunk_size=self.loss_chunk, num_microbatches=1, cp_group=group
        )

    def update(self) -> float:
        """Run the optimizer step; returns the gradient norm."""
        updated, norm, _ = self.optimizer.step()
        assert updated
        return float(norm)

    def close(self) -> None:
        """Free memory and process groups."""
        # Parameter, its gradient's accumulator, the hook on it and DDP make a ring that goes through
        # C++, where the garbage collector does not see it: the storages are emptied by hand.
        tensors = []
        for chunk in self.model:
            tensors += chunk.parameters()
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                tensors += [buffer.param_data, buffer.grad_data]
        for part in self.optimizer.chained_optimizers if self.optimizer else ():
            for parameter, state in part.optimizer.state.items():
                tensors += [parameter, *state.values()]
        self.model = self.optimizer = self.transformer = None
        gc.collect()
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                tensor.data.untyped_storage().resize_(0)
        parallel_state.destroy_model_parallel()
        if device_utils.is_cuda():
            torch.cuda.empty_cache()


def timed(function) -> float:
    """Seconds of a function, including its work on the device."""
    device_utils.synchronize()
    begin = timing.mark()
    function()
    return timing.milliseconds(begin, timing.mark()) / 1e3


def make_batch(vocab_size: int, length: int, size: int = 1, seed: int = 7) -> dict:
    """Sequences, the same on every rank; few tokens are frequent, so that a model can learn them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (vocab_size * torch.rand(size, length + 1, generator=generator) ** 4).long()
    device = device_utils.current_device()
    return {
        "tokens": tokens[:, :-1].contiguous().to(device),
        "labels": tokens[:, 1:].contiguous().to(device),
        "loss_mask": torch.ones(size, length, device=device),
    }
