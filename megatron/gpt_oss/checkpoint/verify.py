# Copyright (c) 2026, the megatron-core gptoss authors.

"""Compare a Megatron checkpoint with a Hugging Face directory.

Weights are compared one expert at a time. If both models fit into memory, hidden states after each
layer and logits are compared too, with transformers if it is installed, otherwise with a Megatron
model that loads the directory.
"""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megatron.gpt_oss.checkpoint.architecture import first_difference
from megatron.gpt_oss.checkpoint.checkpoint_model import (
    VOCABULARY,
    check_same_sizes,
    preset_of_checkpoint,
    vocabulary_of,
)
from megatron.gpt_oss.checkpoint.hf.check import open_hf
from megatron.gpt_oss.checkpoint.hf.config import preset_from_hf_config, read_hf_config
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.checkpoint.mapping import (
    MegatronSource,
    hf_names,
    hf_shape,
    is_expert_matrix,
    is_vocabulary_matrix,
    megatron_to_hf,
)
from megatron.gpt_oss.checkpoint.torch_dist.reader import TorchDistReader, find_iteration
from megatron.gpt_oss.errors import CheckpointError, UsageError
from megatron.gpt_oss.presets import Preset
from megatron.gpt_oss.progress import advance, progress_bar

# Relative to the largest value: another order of fp32 sums gives 1e-6, a wrong layout 1e-2 or more.
LOGITS_TOLERANCE = 1e-4


@dataclass
class Difference:
    """The first element of a tensor that differs, and the largest difference of the tensor."""

    name: str
    index: tuple[int, ...]
    hf: float
    megatron: float
    largest: float

    def __str__(self) -> str:
        parts = self.name.split(".")
        layer = f" (layer {parts[2]})" if parts[:2] == ["model", "layers"] else ""
        return (
            f"{self.name}{layer} at {list(self.index)}: {self.hf:.8g} in the Hugging Face model, "
            f"{self.megatron:.8g} in the Megatron checkpoint; largest difference {self.largest:.3g}"
        )


def verify(
    hf: str | Path,
    load: str | Path,
    logits: str = "auto",
    num_tokens: int = 64,
    progress: bool = False,
) -> bool:
    """Compare two models and print the result.

    Args:
        hf: a Hugging Face gpt-oss directory, BF16 or MXFP4.
        load: a --save directory (its latest iteration) or one iter_* directory.
        logits: "yes", "no", or "auto": if both models fit into half of the free memory.
        num_tokens: number of random tokens for the comparison of logits.
        progress: show a bar on stderr.
    Returns:
        True if the two are the same model.
    Raises:
        UsageError: one of the two is incomplete, or their sizes differ.
    """
    hf = Path(hf)
    hf_reader, preset = open_hf(hf)
    checkpoint = TorchDistReader(find_iteration(load))
    held = preset_of_checkpoint(checkpoint)
    check_same_sizes(held, preset, load, hf)
    same = compare_constants(checkpoint, preset)
    same = compare_rows(checkpoint, preset, hf) and same
    common = min(preset.vocab_size, held.vocab_size)
    trained = dataclasses.replace(held if checkpoint.arguments() else preset, vocab_size=common)
    preset = dataclasses.replace(preset, vocab_size=common)
    first, count = compare_tensors(hf_reader, checkpoint, preset, progress)
    total = len(hf_names(preset))
    if first is not None:
        print(f"tensors: {count} of {total} differ. First difference: {first}")
    elif same:
        print(f"tensors: all {total} are the same, {_in_which_dtypes(hf_reader, checkpoint)}")
    else:
        print(f"tensors: all {total} are the same where both have values")
    same = same and first is None
    needed = 2 * 4 * sum(math.prod(hf_shape(name, preset)) for name in hf_names(preset))
    if logits == "auto" and needed > psutil.virtual_memory().available / 2:
        print(
            f"logits: not compared, because both models need {needed / 1e9:.0f} GB of memory in "
            "fp32. Identical tensors give identical logits."
        )
    elif logits != "no":
        return compare_logits(hf, checkpoint.directory, trained, num_tokens) and same
    return same


def compare_constants(checkpoint: TorchDistReader, preset: Preset) -> bool:
    """Compare constants (window, rotary embedding, top-k, ...) and print the first difference."""
    arguments = checkpoint.arguments()
    difference = first_difference(preset, arguments)
    if difference is not None:
        dest, expected, found = difference
        print(
            f"config: {dest} is {expected} in the Hugging Face model, {found} in the Megatron "
            "checkpoint"
        )
    elif not arguments:
        print("config: not compared, because the Megatron checkpoint has no run arguments")
    return difference is None


def compare_rows(checkpoint: TorchDistReader, preset: Preset, hf: Path) -> bool:
    """Print the vocabulary rows that only one of the two has; padding does not count."""
    held = checkpoint.shape(VOCABULARY[0])[0]
    if held < preset.vocab_size:
        print(
            f"vocabulary: {preset.vocab_size} rows in the Hugging Face model, {held} in the "
            f"Megatron checkpoint; rows {held} to {preset.vocab_size - 1} are missing there"
        )
        return False
    try:
        rows = vocabulary_of(checkpoint, preset.vocab_size).rows
    except CheckpointError:  # padding or tokens, they are not in the directory
        rows = held
    if rows > preset.vocab_size:
        print(
            f"vocabulary: {preset.vocab_size} rows in the Hugging Face model, {rows} in the "
            f"Megatron checkpoint; rows {preset.vocab_size} to {rows - 1} are missing in {hf}"
        )
        return False
    if held > rows:
        print(f"vocabulary: rows {rows} to {held - 1} of the Megatron checkpoint are padding")
    return True


def _in_which_dtypes(hf: HFReader, checkpoint: TorchDistReader) -> str:
    """The dtypes of both for the message."""
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    ours = {names.get(d, str(d)) for d in checkpoint.dtypes()}
    theirs = hf.dtypes() - {"U8"}  # MXFP4 is read as BF16
    if ours == theirs:
        return "bit for bit"
    return (
        f"value for value: {_either(theirs)} in the Hugging Face model, {_either(ours)} in the "
        "Megatron checkpoint"
    )


def _either(names: set[str]) -> str:
    return " and ".join(sorted(names))


def compare_tensors(
    hf: HFReader, checkpoint: MegatronSource, preset: Preset, progress: bool = False
) -> tuple[Difference | None, int]:
    """The first difference in model order, and the number of tensors that differ."""
    first, count = None, 0
    names = hf_names(preset)
    total = sum(math.prod(hf_shape(name, preset)) for name in names)
    with progress_bar(total, " elements", progress) as bar:
        for number, name in enumerate(names):
            difference = _compare_tensor(hf, checkpoint, preset, name)
            if difference is not None:
                first, count = first or difference, count + 1
            advance(bar, math.prod(hf_shape(name, preset)), f"{number + 1} of {len(names)} tensors")
    return first, count


def _compare_tensor(
    hf: HFReader, checkpoint: MegatronSource, preset: Preset, name: str
) -> Difference | None:
    experts = range(preset.num_experts) if is_expert_matrix(name) else (None,)
    found = None
    for expert in experts:
        index = () if expert is None else (expert,)
        if is_vocabulary_matrix(name):
            index = (slice(0, preset.vocab_size),)
        one, other = hf.read(name, index), megatron_to_hf(name, preset, checkpoint, expert)
        if torch.equal(one, other.to(one.dtype)) and one.dtype == other.dtype:
            continue
        one, other = one.double(), other.double()
        differ = ~(one == other)  # NaN differs from all
        if not differ.any():
            continue  # equal values of different dtypes
        largest = (one - other).abs().nan_to_num(torch.inf).max().item()
        if found is None:
            place = tuple(differ.nonzero()[0].tolist())
            at = () if expert is None else (expert,)
            found = Difference(name, at + place, one[place].item(), other[place].item(), largest)
        found.largest = max(found.largest, largest)
    return found


@torch.no_grad()
def compare_logits(hf: Path, iteration: Path, preset: Preset, num_tokens: int) -> bool:
    """Run both models in fp32 and print the first layer and token that differ.

    Args:
        hf: the Hugging Face directory.
        iteration: the checkpoint.
        preset: the model of the checkpoint, with the vocabulary rows that both have.
        num_tokens: number of random tokens.
    """
    if num_tokens < 1:
        raise UsageError(f"--num-tokens {num_tokens} is invalid. Give 1 or more.")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(preset.vocab_size, (1, num_tokens), generator=generator)
    has_transformers = importlib.util.find_spec("transformers") is not None
    reference = "transformers" if has_transformers else "Megatron with the Hugging Face weights"
    run = _run_transformers if has_transformers else _run_megatron_hf
    expected, found = run(hf, ids), _run_megatron(iteration, preset, ids)
    expected[-1] = expected[-1][:, : preset.vocab_size]
    first_layer = first_token = None
    for layer, (one, other) in enumerate(zip(expected[:-1], found[:-1])):
        token = _first_token(one, other)
        if token is not None:
            first_layer, first_token = layer, token
            break
    error = _relative_error(expected[-1], found[-1])
    token = _first_token(expected[-1], found[-1])
    largest = error.max().item()
    if token is None and first_layer is None:
        print(f"logits: the same as {reference}, {num_tokens} tokens, error {largest:.1e}")
        return True
    print(f"logits: not those of {reference}: error {largest:.1e} of the largest logit.", end=" ")
    if first_layer is not None:
        print(
            f"Hidden states differ first after layer {first_layer}, at token {first_token}.",
            end=" ",
        )
    print("" if token is None else f"Logits differ first at token {token}.")
    return False


def _relative_error(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[tokens]: largest difference of each token relative to the largest value of all tokens."""
    return ((one - other).abs().amax(dim=-1) / one.abs().max()).nan_to_num(torch.inf)


def _first_token(one: torch.Tensor, other: torch.Tensor) -> int | None:
    bad = (_relative_error(one, other) > LOGITS_TOLERANCE).nonzero()
    return int(bad[0]) if len(bad) else None


def _run_transformers(directory: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """fp32 hidden states [tokens, h] after each layer, followed by logits [tokens, vocabulary]."""
    import transformers

    options = {}
    if "quantization_config" in read_hf_config(directory):
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model = transformers.GptOssForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **options
    ).float()
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, inputs, output: states.append(
                (output[0] if isinstance(output, tuple) else output)[0]
            )
        )
    logits = model.eval()(ids).logits[0]
    return [*states, logits]


def _run_megatron_hf(directory: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    from megatron.gpt_oss.checkpoint.load_hf import load_hf
    from megatron.gpt_oss.diagnostics.standalone_model import single_rank_model

    preset = preset_from_hf_config(read_hf_config(directory))
    with single_rank_model(preset) as model:
        load_hf([model], directory)
        return _run(model, ids)


def _run_megatron(iteration: Path, preset: Preset, ids: torch.Tensor) -> list[torch.Tensor]:
    from megatron.core import dist_checkpointing
    from megatron.gpt_oss.diagnostics.standalone_model import single_rank_model

    with single_rank_model(preset) as model:
        metadata = dist_checkpointing.load_content_metadata(str(iteration))
        wanted = {"model": model.sharded_state_dict(metadata=metadata)}
        state = dist_checkpointing.load(wanted, str(iteration))
        model.load_state_dict(state["model"])
        return _run(model, ids)


def _run(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    states: list[torch.Tensor] = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(  # [s, b, h]
            lambda module, inputs, output: states.append(output[0][:, 0].cpu())
        )
    device = next(model.parameters()).device
    positions = torch.arange(ids.shape[1], device=device).unsqueeze(0)
    logits = model(ids.to(device), positions, None)[0].cpu()
    return [*states, logits]
