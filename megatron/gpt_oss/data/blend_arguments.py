# Copyright (c) 2026, the megatron-core gptoss authors.

"""--data-blend, in terms of Megatron's own flags."""

from argparse import Namespace

from megatron.gpt_oss.data.blend import read_blend
from megatron.gpt_oss.errors import UsageError

_OTHER_WAYS = (
    "data_path",
    "split",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "data_args_path",
    "per_split_data_args_path",
    "mock_data",
    "multiple_validation_sets",
    "validation_set_names",
    "full_validation",
)


def blend_defaults(given: Namespace) -> dict:
    """Megatron's arguments that say what the data file says; {} without one.

    Raises:
        UsageError: a mistake in the file, or another flag that names data.
    """
    file = getattr(given, "data_blend", None)
    if file is None:
        return {}
    for dest in _OTHER_WAYS:
        if getattr(given, dest, None):
            flag = f"--{dest.replace('_', '-')}"
            raise UsageError(f"{flag} and --data-blend {file} both name data. Drop one of them.")
    blend = read_blend(file)
    words = [word for source in blend.sources for word in (repr(source.weight), source.prefix)]
    defaults = {"train_data_path": words}
    if blend.validation:
        defaults["valid_data_path"] = list(blend.validation.values())
        defaults["multiple_validation_sets"] = True
        defaults["validation_set_names"] = list(blend.validation)
    else:
        defaults["eval_iters"] = 0
    return defaults
