# Copyright (c) 2026, the megatron-core gptoss authors.

"""The files that a command line names: data, tokenizer, Hugging Face checkpoint."""

import glob
import importlib.util
import os
import re
from argparse import Namespace
from pathlib import Path

from megatron.gpt_oss.arguments.validate_data import read_prefixes
from megatron.gpt_oss.checkpoint.hf.config import preset_from_hf_config, read_hf_config
from megatron.gpt_oss.data.indexed_dataset import check_dataset
from megatron.gpt_oss.errors import PresetError, UsageError
from megatron.gpt_oss.presets import PRESETS, Preset, architecture_flags, extend_context


def check_files(given: Namespace, preset: Preset | None) -> None:
    """Refuse missing files of data, tokenizer and Hugging Face checkpoint.

    Raises:
        UsageError: names the flag, the path and what is missing.
    """
    for dest in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        flag = "--" + dest.replace("_", "-")
        for word in read_prefixes(getattr(given, dest, None), flag):
            _check_dataset(flag, word)
    for dest in ("data_cache_path", "tensorboard_dir", "wandb_save_dir"):
        path = getattr(given, dest, None)
        if path is not None and os.path.exists(path) and not os.path.isdir(path):
            flag = "--" + dest.replace("_", "-")
            raise UsageError(f"{flag} {path} is not a directory. Give another path.")
    if getattr(given, "tokenizer_model", None) is not None:
        _check_tokenizer(given.tokenizer_model)
    if getattr(given, "load_hf", None) is not None:
        _check_hf_checkpoint(given.load_hf, preset, getattr(given, "yarn_factor", None))
        if not hasattr(given, "tokenizer_type") and not hasattr(given, "tokenizer_model"):
            _check_tokenizer(os.path.join(given.load_hf, "tokenizer.json"))


def tokenizer_defaults(given: Namespace) -> dict:
    """The tokenizer of --load-hf, unless the command line names one."""
    if hasattr(given, "tokenizer_type"):
        return {}
    model = getattr(given, "tokenizer_model", None) or getattr(given, "load_hf", None)
    if model is None and hasattr(given, "dry_run") and given.preset in PRESETS:
        # A dry run needs only the vocabulary size. The null tokenizer adds an end-of-document id.
        rows = PRESETS[given.preset].vocab_size
        return {
            "tokenizer_type": "NullTokenizer",
            "vocab_size": getattr(given, "vocab_size", rows - 1),
        }
    if model is None:
        raise UsageError(
            "No tokenizer. Give --tokenizer-model DIR with the tokenizer.json that the data was "
            "tokenized with (--load-hf DIR uses its own)."
        )
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model}


def _check_dataset(flag: str, prefix: str) -> None:
    if "://" in prefix:
        return  # object storage
    missing = [prefix + end for end in (".bin", ".idx") if not os.path.isfile(prefix + end)]
    if not missing:
        check_dataset(prefix)
        return
    hint = "Create the dataset with: gptoss tokenize"
    if glob.glob(f"{glob.escape(prefix)}.*-*.idx"):
        hint = "It was split by length: use --data-blend with a file that names it"
    if prefix.endswith((".bin", ".idx")):
        hint = f"Give the path without its extension: {prefix[:-4]}"
    raise UsageError(f"{flag} {prefix}: no file {' and no file '.join(missing)}. {hint}.")


def _check_tokenizer(model: str) -> None:
    try:
        model.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--tokenizer-model {model} is not UTF-8, which the tokenizers package requires. Rename "
            "it, or set a UTF-8 locale: LC_ALL=C.UTF-8."
        ) from error
    if os.path.isfile(model):
        return
    if os.path.isdir(model):
        if glob.glob(f"{glob.escape(model)}/*token*") or glob.glob(f"{glob.escape(model)}/vocab*"):
            return
        raise UsageError(
            f"--tokenizer-model {model} has no tokenizer.json. Give a directory that has one (any "
            "Hugging Face gpt-oss checkpoint does)."
        )
    looks_like_hub_name = re.fullmatch(r"[\w-]+/[\w.-]+", model) and not model.endswith(".json")
    if looks_like_hub_name and importlib.util.find_spec("transformers") is not None:
        return
    raise UsageError(
        f"--tokenizer-model {model}: no such file or directory. Give a directory with "
        "tokenizer.json (any Hugging Face gpt-oss checkpoint has one)."
    )


def _check_hf_checkpoint(directory: str, preset: Preset | None, yarn_factor: float | None) -> None:
    from megatron.gpt_oss.checkpoint.hf.reader import HFReader

    config = read_hf_config(Path(directory))
    HFReader(Path(directory)).check_files()
    if preset is None:
        return
    found = extend_context(preset_from_hf_config(config), yarn_factor)
    theirs, ours = architecture_flags(found), architecture_flags(preset)
    for dest, value in ours.items():
        if theirs[dest] != value:
            raise PresetError(
                f"--load-hf {directory} is a different model than --preset {preset.name}: it has "
                f"{dest} = {theirs[dest]}, the preset {value}. Choose the preset (and "
                "--preset-layers) that matches the checkpoint."
            )
