# Copyright (c) 2026, the megatron-core gptoss authors.

"""pretrain_gpt_oss.py on a GPU: what the CPU cannot show of the optimizer on the host and of saves
next to the training."""

import pytest
import torch

from megatron.gpt_oss.training.metrics.jsonl import read_metrics
from megatron.training import checkpoint_integrity
from tests.harness import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

FLAGS = "--bf16 --use-distributed-optimizer --train-iters 6 --eval-interval 1000"
ON_HOST = (
    "--optimizer-cpu-offload --use-precision-aware-optimizer --optimizer-offload-fraction 0.5 "
    "--overlap-cpu-optimizer-d2h-h2d"
)


def losses(records):
    return torch.tensor([record["loss"] for _, record in sorted(runs.steps(records).items())])


@pytest.fixture(scope="module")
def on_gpu(ranks, inputs, tmp_path_factory):
    """Losses of six steps without CPU offload and without a save."""
    run_dir = tmp_path_factory.mktemp("runs") / "on_gpu"
    return losses(runs.start(ranks, inputs, run_dir, FLAGS))


def start_and_go_on(ranks, inputs, run_dir, flags):
    """Losses of three steps, and of three more in a second start of the same command."""
    runs.start(ranks, inputs, run_dir, f"{flags} --exit-interval 3")
    assert checkpoint_integrity.choose(str(run_dir / "checkpoints")).iteration == 3
    return losses(runs.start(ranks, inputs, run_dir, flags))


@pytest.mark.parametrize("more", ["", "--async-save --save-interval 1"])
def test_resume(ranks, inputs, tmp_path, on_gpu, more):
    found = start_and_go_on(ranks, inputs, tmp_path / "run", f"{FLAGS} {more}")
    torch.testing.assert_close(found, on_gpu, rtol=1e-3, atol=0)
    if more:
        seconds = runs.only(read_metrics(tmp_path / "run" / "metrics.jsonl"), "checkpoint")
        assert sorted(seconds) == [1, 2, 3, 4, 5, 6]
        assert all(second["background_seconds"] > 0 for second in seconds.values())


@pytest.mark.parametrize("more", ["", "--async-save --save-interval 1"])
def test_optimizer_on_the_host(ranks, inputs, tmp_path, on_gpu, more):
    """The same steps as with all of it on the GPU, over a checkpoint too."""
    found = start_and_go_on(ranks, inputs, tmp_path / "run", f"{FLAGS} {ON_HOST} {more}")
    torch.testing.assert_close(found, on_gpu, rtol=1e-3, atol=0)
