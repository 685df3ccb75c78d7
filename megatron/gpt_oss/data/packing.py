# Copyright (c) 2026, the megatron-core gptoss authors.

"""Pack items of different sizes into packs of equal capacity."""

import numpy


def best_fit(sizes: numpy.ndarray, capacity: int, rng: numpy.random.Generator) -> list[list[int]]:
    """Best fit decreasing: each item, from large to small, goes to the pack with the least room that fits.

    Args:
        sizes: [items] int, each 1 to capacity.
        capacity: of a pack.
        rng: orders items of equal size, and the packs.
    Returns:
        The items of each pack.
    """
    shuffled = rng.permutation(len(sizes))
    order = shuffled[numpy.argsort(-sizes[shuffled], kind="stable")]
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # {room: packs}
    rooms = 0  # bit i is set if a pack has room i: the smallest room that fits is one bit search
    for item, size in zip(order.tolist(), sizes[order].tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            number, room = len(packs), capacity
            packs.append([])
        packs[number].append(item)
        if room > size:
            with_room.setdefault(room - size, []).append(number)
            rooms |= 1 << (room - size)
    return [packs[number] for number in rng.permutation(len(packs))]
