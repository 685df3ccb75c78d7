# Copyright (c) 2026, the megatron-core gptoss authors.

"""Which routed tokens belong to which expert, without waiting for the device."""

from functools import cached_property

import torch


class ExpertSegments:
    """Routed tokens sorted by expert: a segment for each expert, which may be empty.

    Args:
        tokens_per_expert: [g], an integer type, on any device. Its sum is the number of rows.
        device: device of the routed tokens.
    """

    def __init__(self, tokens_per_expert: torch.Tensor, device: torch.device | str):
        self.num_experts = tokens_per_expert.numel()
        self._tokens_per_expert = tokens_per_expert
        on_device = tokens_per_expert.to(device, non_blocking=True)
        # [g], int32, on the device: the end of each segment.
        self.ends = on_device.cumsum(0, dtype=torch.int32)

    @cached_property
    def slices(self) -> list[tuple[int, int, int]]:
        """(expert, first row, row after the last) of each expert that has a token.

        Waits for the device if the counts are there.
        """
        slices, start = [], 0
        for expert, count in enumerate(self._tokens_per_expert.tolist()):
            if count:
                slices.append((expert, start, start + count))
            start += count
        return slices

    def owners(self, num_rows: int) -> torch.Tensor:
        """[num_rows], int64: the expert of each row."""
        rows = torch.arange(num_rows, device=self.ends.device, dtype=torch.int32)
        return torch.searchsorted(self.ends, rows, right=True)

    def sum_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[t, n] to [g, n]: the sum of each expert's rows, 0 where it has none."""
        sums = rows.new_zeros(self.num_experts, rows.shape[1])
        return sums.index_add_(0, self.owners(rows.shape[0]), rows)
