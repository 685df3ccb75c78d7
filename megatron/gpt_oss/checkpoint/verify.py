# Copyright (c) 2026, the megatron-core gptoss authors.

"""Whether a Megatron checkpoint is the same model as a Hugging Face folder, and where not.

First the weights, an expert at a time, whatever the size; then, where both models fit into memory,
the function: hidden states after every layer and logits, against transformers where it is installed
(else against a Megatron model that reads the folder).
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
from megatron.gpt_oss.checkpoint.hf.check import check_tensors
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
from megatron.gpt_oss.progress import Progress

# fp32 sums in another order differ by 1e-6 of the largest value, a wrong layout by 1e-2 and more.
LOGITS_TOLERANCE = 1e-4


@dataclass
class Difference:
    """The first place of a tensor where the two differ, and how far they do at most."""

    name: str
    index: tuple[int, ...]
    hf: float
    megatron: float
    largest: float

    def __str__(self) -> str:
        parts = self.name.split(".")
        layer = f" (layer {parts[2]})" if parts[:2] == ["model", "layers"] else ""
        return (
            f"{self.name}{layer} at {list(self.index)}: {self.hf:.8g} in the Hugging Face checkpoint, "
            f"{self.megatron:.8g} in the checkpoint; largest difference {self.largest:.3g}"
        )


def verify(
    hf: str | Path,
    load: str | Path,
    logits: str = "auto",
    num_tokens: int = 64,
    progress: bool = False,
) -> bool:
    """Compare and print what was found.

    Args:
        hf: a Hugging Face gpt-oss folder, BF16 or MXFP4.
        load: a --save folder (its latest iteration) or one iter_* folder.
        logits: "yes", "no", or "auto": where both models fit into half of the free memory.
        num_tokens: length of the sequence of random tokens that goes through both.
        progress: show a line on stderr.
    Returns:
        True if the two are the same model.
    Raises:
        UsageError: one of the two is not whole, or they have other sizes.
    """
    hf = Path(hf)
    preset = preset_from_hf_config(read_hf_config(hf))
    hf_reader, checkpoint = HFReader(hf), TorchDistReader(find_iteration(load))
    check_tensors(hf_reader, preset)
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
            f"logits: not compared, because both models need {needed / 1e9:.0f} GB of memory in fp32. "
            "Identical tensors give identical logits."
        )
    elif logits != "no":
        return compare_logits(hf, checkpoint.folder, trained, num_tokens) and same
    return same


def compare_constants(checkpoint: TorchDistReader, preset: Preset) -> bool:
    """Print the first constant (window, rotation, top-k, ...) in which the two differ."""
    arguments = checkpoint.arguments()
    difference = first_difference(preset, arguments)
    if difference is not None:
        dest, expected, found = difference
        print(
            f"config: {dest} is {expected} in the Hugging Face checkpoint, {found} in the checkpoint"
        )
    elif not arguments:
        print("config: not compared, because the checkpoint does not hold its run arguments")
    return difference is None


def compare_rows(checkpoint: TorchDistReader, preset: Preset, hf: Path) -> bool:
    """Print which rows of the vocabulary one of the two has alone; padding is not missed."""
    held = checkpoint.shape(VOCABULARY[0])[0]
    if held < preset.vocab_size:
        print(
            f"vocabulary: {preset.vocab_size} rows in the Hugging Face checkpoint, {held} in the "
            f"checkpoint; rows {held} to {preset.vocab_size - 1} are missing there"
        )
        return False
    try:
        rows = vocabulary_of(checkpoint, preset.vocab_size).rows
    except CheckpointError:  # padding or not, they are not in the folder
        rows = held
    if rows > preset.vocab_size:
        print(
            f"vocabulary: {preset.vocab_size} rows in the Hugging Face checkpoint, {rows} in the "
            f"checkpoint; rows {preset.vocab_size} to {rows - 1} are missing in {hf}"
        )
        return False
    if held > rows:
        print(f"vocabulary: rows {rows} to {held - 1} of the checkpoint are padding")
    return True


def _in_which_dtypes(hf: HFReader, checkpoint: TorchDistReader) -> str:
    """Whether the same values are the same bits."""
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    ours = {names.get(d, str(d)) for d in checkpoint.dtypes()}
    stored = {entry.dtype for entries in hf.files().values() for entry in entries.values()}
    theirs = stored - {"U8"}  # MXFP4 is BF16 when it is read
    if ours == theirs:
        return "bit for bit"
    return f"value for value: {_either(theirs)} in Hugging Face, {_either(ours)} in the checkpoint"


def _either(names: set[str]) -> str:
    return " and ".join(sorted(names))


def compare_tensors(
    hf: HFReader, checkpoint: MegatronSource, preset: Preset, progress: bool = False
) -> tuple[Difference | None, int]:
    """The first difference in the order of the forward, and the number of tensors that differ."""
    first, count = None, 0
    names = hf_names(preset)
    with Progress(sum(math.prod(hf_shape(n, preset)) for n in names), "G", 1e-9, progress) as bar:
        for number, name in enumerate(names):
            difference = _compare_tensor(hf, checkpoint, preset, name)
            if difference is not None:
                first, count = first or difference, count + 1
            bar.advance(math.prod(hf_shape(name, preset)), f"{number + 1} of {len(names)} tensors")
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
            continue  # the same values in a wider type
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
        hf: the Hugging Face folder.
        iteration: the checkpoint.
        preset: the model of the checkpoint, with the rows of vocabulary that both have.
        num_tokens: length of the sequence.
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
    """[tokens]: the largest difference at a token, relative to the largest value of all."""
    return ((one - other).abs().amax(dim=-1) / one.abs().max()).nan_to_num(torch.inf)


def _first_token(one: torch.Tensor, other: torch.Tensor) -> int | None:
    bad = (_relative_error(one, other) > LOGITS_TOLERANCE).nonzero()
    return int(bad[0]) if len(bad) else None


def _run_transformers(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states after each layer, [tokens, h], then logits, [tokens, vocabulary]; fp32."""
    import transformers

    options = {}
    if "quantization_config" in read_hf_config(folder):
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
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


def _run_megatron_hf(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    from megatron.gpt_oss.checkpoint.load_hf import load_hf
    from megatron.gpt_oss.diagnostics.standalone_model import single_rank_model

    preset = preset_from_hf_config(read_hf_config(folder))
    with single_rank_model(preset) as model:
        load_hf([model], folder)
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
