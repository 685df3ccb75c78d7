# Copyright (c) 2026, the megatron-core gptoss authors.

"""Check that the tensors of a Hugging Face directory are those that its config.json describes.

Only headers are read, so that the check of a 65 GB model takes less than a second.
"""

from pathlib import Path

from megatron.gpt_oss.checkpoint.hf.config import (
    CONFIG_NAME,
    preset_from_hf_config,
    read_hf_config,
)
from megatron.gpt_oss.checkpoint.hf.mxfp4 import BLOCK
from megatron.gpt_oss.checkpoint.hf.reader import (
    INDEX_NAME,
    MXFP4_SUFFIXES,
    SINGLE_NAME,
    HFReader,
)
from megatron.gpt_oss.checkpoint.mapping import hf_names, hf_shape, is_expert_matrix
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.json_file import brief
from megatron.gpt_oss.presets import Preset

_FLOATS = ("BF16", "F32")


def open_hf(directory: str | Path) -> tuple[HFReader, Preset]:
    """Open a Hugging Face directory and check its config.json, files, dtypes and shapes.

    Returns:
        Reader of the tensors, and the preset of config.json.
    Raises:
        CheckpointError: names file, field or tensor, what was found and what was expected.
    """
    config = read_hf_config(directory)
    preset = preset_from_hf_config(config)
    reader = HFReader(directory)
    reader.check_files()
    _check_other_files(reader)
    _check_quantization(reader, preset, config)
    expected = _expected_tensors(reader, preset)
    _check_dtypes_and_shapes(reader, expected)
    _check_index(reader)
    _check_no_other_tensors(reader, expected, preset)
    return reader, preset


def _check_dtypes_and_shapes(reader: HFReader, expected: dict[str, tuple]) -> None:
    for name, (dtypes, shape) in expected.items():
        entry = reader.entry(name)
        if entry.shape != shape:
            raise CheckpointError(
                f"{reader.stored_in(name)}: '{name}' has shape {entry.shape}, expected {shape} "
                "from config.json of the same directory. The two belong to different models."
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{reader.stored_in(name)}: '{name}' has dtype {entry.dtype}, expected "
                f"{' or '.join(dtypes)}. Only BF16, F32 and MXFP4 checkpoints are supported."
            )


def _check_index(reader: HFReader) -> None:
    """Reject an index with tensors that no file has, and tensors that are in two files."""
    promised = sorted(
        reader.stored_names() - {n for entries in reader.files().values() for n in entries}
    )
    if promised:
        raise CheckpointError(
            f"{reader.stored_in(promised[0])} does not hold '{promised[0]}', which {INDEX_NAME} "
            "lists. Download the checkpoint again."
        )
    for file, entries in reader.files().items():
        twice = sorted(name for name in entries if reader.file_of(name) not in (file, None))
        if twice:
            raise CheckpointError(
                f"{reader.directory / file} holds '{twice[0]}', which {INDEX_NAME} places in "
                f"{reader.file_of(twice[0])}. One tensor in two files: download it again."
            )


def _check_no_other_tensors(reader: HFReader, expected: dict[str, tuple], preset: Preset) -> None:
    for file, entries in reader.files().items():
        unknown = sorted(set(entries) - set(expected))
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise CheckpointError(
                f"{reader.directory / file} holds '{unknown[0]}'{more}, which gpt-oss does not "
                f"have; expected the {len(expected)} tensors of {preset.num_layers} layers. Is it "
                "a different model, or a quantization other than MXFP4?"
            )


def _check_other_files(reader: HFReader) -> None:
    """Reject other weight files, and adapters: transformers may read them instead."""
    read = set(reader.files())
    for path in sorted(reader.directory.glob("*.safetensors")):
        if path.name in read:
            continue
        what = "transformers reads it instead" if path.name == SINGLE_NAME else "nothing reads it"
        raise CheckpointError(
            f"{path} is not listed in {INDEX_NAME} or is next to {SINGLE_NAME}: {what}. Move it "
            "out of the directory, or download the checkpoint again."
        )
    adapter = reader.directory / "adapter_config.json"
    if adapter.exists():
        raise CheckpointError(
            f"{adapter}: the directory holds an adapter, which is not supported. Merge it into "
            "the weights (peft: merge_and_unload) and save the model."
        )


def _check_quantization(reader: HFReader, preset: Preset, config: dict) -> None:
    """Reject a directory whose config.json and files disagree about MXFP4."""
    declared = config.get("quantization_config")
    matrices = [name for name in hf_names(preset) if is_expert_matrix(name)]
    held = [name for name in matrices if reader.is_mxfp4(name)]
    if held and declared is None:
        raise CheckpointError(
            f"{reader.stored_in(held[0])} holds '{held[0]}' in MXFP4, but {CONFIG_NAME} has "
            "no quantization_config, which transformers needs to read it. Download "
            f"{CONFIG_NAME} again."
        )
    if declared is not None and not held:
        raise CheckpointError(
            f"{reader.directory / CONFIG_NAME} has quantization_config = {brief(declared)}, but "
            "the files hold no MXFP4; remove the field."
        )


def _expected_tensors(reader: HFReader, preset: Preset) -> dict[str, tuple]:
    """{name: (allowed dtypes, shape)} of each tensor that must be stored."""
    expected: dict[str, tuple] = {}
    for name in hf_names(preset):
        shape = hf_shape(name, preset)
        if is_expert_matrix(name) and reader.is_mxfp4(name):
            experts, fan_in, fan_out = shape
            if fan_in % BLOCK:
                raise CheckpointError(
                    f"{reader.directory} has '{name}' in MXFP4, whose block size is {BLOCK}, but "
                    f"config.json has {fan_in} inputs. The two belong to different models."
                )
            groups = (experts, fan_out, fan_in // BLOCK)
            expected[name + MXFP4_SUFFIXES[0]] = (("U8",), (*groups, BLOCK // 2))
            expected[name + MXFP4_SUFFIXES[1]] = (("U8",), groups)
        else:
            expected[name] = (_FLOATS, shape)
    return expected
