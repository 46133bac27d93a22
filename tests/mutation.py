"""Damaging bytes and JSON, for tests of what reads files."""

import json


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


ODD = (None, True, -1, 0, 10**30, 1e300, 2.5, "", "x" * 3000, "../../x", [], {}, [[]], {"a": {}})


def mutated_json(value, rng):
    """A copy of a JSON value in which one node is odd, doubled, renamed or gone."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    parent, key = rng.choice(places)
    kind = rng.randrange(4) if isinstance(parent, dict) else 0
    if kind < 2:
        parent[key] = rng.choice(ODD)
    elif kind == 2:
        del parent[key]
    else:
        parent[f"{key}\x1b[31m"] = parent.pop(key)
    return value


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)
