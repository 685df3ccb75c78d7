# Copyright (c) 2026, the megatron-core gptoss authors.

"""Progress bars on stderr."""

from tqdm import tqdm


def progress_bar(total: int, unit: str = "B", enabled: bool = True, initial: int = 0) -> tqdm:
    """A tqdm bar; shows nothing if stderr is not a terminal.

    Args:
        total: amount of work, in `unit`.
        unit: unit of the amounts; tqdm shows them with an SI prefix.
        enabled: False shows nothing.
        initial: work that an earlier process did; does not count for the rate.
    """
    disable = None if enabled else True  # None: tqdm checks whether stderr is a terminal
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        disable=disable,
        dynamic_ncols=True,
    )


def advance(bar: tqdm, amount: int, note: str) -> None:
    """Add finished work; the next redraw shows the note after the rate."""
    bar.set_postfix_str(note, refresh=False)
    bar.update(amount)
