"""Damaging bytes, for tests of what reads files."""


def mutated(whole, rng):
    """Flips, cuts, deletes, inserts or overwrites bytes; the result is never the original."""
    data = bytearray(whole)
    while data == whole:
        at = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        else:
            data[at : at + 8] = bytes(rng.choice((0, 255, 127)) for _ in range(8))
    return bytes(data)
