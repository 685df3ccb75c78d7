# Copyright (c) 2026, the megatron-core gptoss authors.

"""Tables as aligned text."""

from collections.abc import Collection, Sequence


def aligned(
    rows: Sequence[Sequence[str]], header: bool = True, left: Collection[int] | None = None
) -> str:
    """Pad the columns of a table to equal width, two spaces apart.

    Args:
        rows: cells, with the header first.
        header: whether rows has one.
        left: columns that are left-aligned; None: those with a cell that is not a number.
    """
    columns = list(zip(*rows))
    widths = [max(map(len, column)) for column in columns]
    if left is None:
        left = {
            i
            for i, column in enumerate(columns)
            if not all(cell[:1].isdigit() for cell in column[header:])
        }
    lines = (
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
