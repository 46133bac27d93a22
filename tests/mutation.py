"""Damaging bytes and JSON, for tests of what reads files.

Each file gets 200 mutations; QKD_JAX_MUTATIONS=5000 tries more.
"""

import contextlib
import json
import os
import random
import signal

COUNT = int(os.environ.get("QKD_JAX_MUTATIONS", 200))
SECONDS = 10  # of the processor, which a busy machine does not stretch


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


def mutated_text(whole, rng):
    """Damages the bytes of a JSON file, or a value in it."""
    if rng.random() < 0.3:
        return mutated(whole, rng)
    return json.dumps(mutated_json(json.loads(whole), rng)).encode()


def accepted(path, read, *, damage=mutated, named=None, count=COUNT):
    """Damages a file again and again; yields what `read()` returns where it takes the file.

    A refusal is a ValueError with the file's name (or `named`). Any other error, and a read of more
    than `SECONDS`, is a fault of the reader and goes out with the mutation's number. At the end the
    file is as it was.
    """
    whole, rng = path.read_bytes(), random.Random(path.name)
    try:
        for number in range(count):
            data = damage(whole, rng)
            path.write_bytes(data)
            try:
                with _time_limit():
                    found = read()
            except ValueError as error:
                assert str(named or path) in str(error), (number, str(error), data[:200])
                continue
            except BaseException as error:
                error.add_note(f"mutation {number} of {path.name}: {data[:200]!r}")
                raise
            yield found
    finally:
        path.write_bytes(whole)


@contextlib.contextmanager
def _time_limit():
    def late(*_):
        raise TimeoutError(f"reading took more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
