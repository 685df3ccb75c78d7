# Copyright (c) 2026, the megatron-core gptoss authors.
"""Suppresses warnings of Megatron's imports about missing optional packages.

Apex and TransformerEngine are used where they are installed; nothing needs them.
"""

import warnings

from megatron.gpt_oss.errors import environment_rank

_IMPORT_NOTICES = (
    ".*(Apex|apex|Transformer Engine).*not installed.*",
    "Only transformer-engine>=1.7.0 supports MoE.*",
    ".*absl.logging is not installed.*",
    ".* is experimental and still under active development.*",
)


def silence_import_notices() -> None:
    """Call before Megatron is imported. Ranks other than the first stay silent altogether."""
    for message in _IMPORT_NOTICES:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if environment_rank() != 0:
        warnings.filterwarnings("ignore")
