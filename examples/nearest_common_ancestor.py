"""Nearest common ancestors in the classic contest format, from standard input.

    python examples/nearest_common_ancestor.py < cases.txt

First comes T, the number of cases; each case is N, then N - 1 lines "parent child" over the nodes 1
to N, then one line with two nodes. One line answers each case. Wrong input ends the program with
code 1 and a message that names the line.

A case asks one question, so the answer is found by climbing from both nodes: a table that answers
in constant time (`qkd_jax.hierarchy.ClassTree.lca`) pays from a few dozen questions a tree. Only
NumPy is imported: JAX takes longer to start than 100 cases of 10,000 nodes take to answer.
"""

from __future__ import annotations

import contextlib
import re
import sys

import numpy as np

DIGITS = 18  # of a number, with its sign: more than any case has nodes


class InputError(ValueError):
    """Wrong input; the message names the line."""


def answers(data: bytes) -> list[int]:
    """Returns the nearest common ancestor of each case.

    Raises:
        InputError: the input does not follow the format, or the edges of a case are no tree.
    """
    numbers = _numbers(data)
    place = 0

    def complain(at: int, what: str) -> InputError:
        line = _line(data, at)
        # A number too many or too few moves all behind it: the fault is where that happened.
        if (uneven := _uneven_line(data, before=line)) is not None:
            return InputError(uneven)
        return InputError(f"line {line}: {what}")

    def take(count: int, what: str) -> np.ndarray:
        nonlocal place
        if place + count > len(numbers):
            raise complain(len(numbers) - 1, f"the input ends here, {what} is missing.")
        place += count
        return numbers[place - count : place]

    found = []
    (cases,) = take(1, "the number of cases")
    if cases < 0:
        raise complain(0, f"the number of cases is {cases}; it must be 0 or more.")
    for case in range(1, cases + 1):
        (count,) = take(1, f"the number of nodes of case {case}")
        if count < 1:
            raise complain(place - 1, f"case {case} has {count} nodes; it must be 1 or more.")
        first = place
        edges = take(2 * (int(count) - 1), f"an edge of case {case}").reshape(-1, 2)
        query = take(2, f"the query of case {case}")
        body = numbers[first:place]
        outside = np.flatnonzero((body < 1) | (body > count))
        if len(outside):
            at = first + int(outside[0])
            raise complain(at, f"node {numbers[at]} of case {case} is not one of 1 to {count}.")
        parent = np.zeros(count + 1, np.int64)
        parent[edges[:, 1]] = edges[:, 0]
        given = np.bincount(edges[:, 1], minlength=count + 1)
        if given.max(initial=0) > 1:
            child = edges[:, 1]
            _, once = np.unique(child, return_index=True)
            row = int(np.setdiff1d(np.arange(len(child)), once)[0])
            raise complain(
                first + 2 * row, f"node {child[row]} of case {case} gets a second parent."
            )
        if (inside := _on_a_cycle(parent)) is not None:
            row = int(np.flatnonzero(edges[:, 1] == inside)[0])
            raise complain(
                first + 2 * row, f"node {inside} of case {case} is its own ancestor: no tree."
            )
        found.append(_nearest(parent.tolist(), int(query[0]), int(query[1])))
    if place < len(numbers):
        raise complain(place, f"{cases} cases were announced, and there is more.")
    return found


def _numbers(data: bytes) -> np.ndarray:
    words = data.split()
    if not words:
        raise InputError("line 1: the input is empty; it starts with the number of cases.")
    if data.translate(None, b"0123456789-+ \t\r\n") == b"":
        array = np.array(words)
        if array.itemsize <= DIGITS:
            with contextlib.suppress(ValueError):  # a sign in the middle of a word
                return array.astype(np.int64)
    for at, word in enumerate(words):
        if len(word) > DIGITS or not re.fullmatch(rb"[+-]?[0-9]+", word):
            shown = word.decode(errors="replace")
            raise InputError(
                f"line {_line(data, at)}: {shown!r:.40} is not a whole number of at most "
                f"{DIGITS - 1} digits."
            )
    return np.array([int(word) for word in words])


def _line(data: bytes, at: int) -> int:
    """The line, counted from 1, on which the `at`-th word stands (counted from 0)."""
    for number, line in enumerate(data.splitlines(), 1):
        at -= len(line.split())
        if at < 0:
            return number
    return data.count(b"\n") + 1


def _uneven_line(data: bytes, *, before: int) -> str | None:
    """Names the first line above `before` with another count of numbers than the format has."""
    edges, first = 0, True  # edges and the query are lines of two numbers
    for number, line in enumerate(data.splitlines(), 1):
        words = line.split()
        if number >= before:
            return None
        if not words:
            continue
        wanted = 2 if edges else 1
        if len(words) != wanted:
            return f"line {number}: it has {len(words)} numbers, and {wanted} belong here."
        if edges:
            edges -= 1
        elif not first:
            edges = max(int(words[0]), 0)
        first = False
    return None


def _on_a_cycle(parent: np.ndarray) -> int | None:
    """A node on a cycle, or None; `parent[root]` is 0, and so is `parent[0]`.

    Each pass makes everyone's pointer reach twice as far: after log2(N) passes only the nodes on or
    below a cycle point at anything but 0.
    """
    far, reach = parent, 1
    while reach < len(parent) and far.any():
        far, reach = far[far], 2 * reach
    beyond = np.flatnonzero(far)
    return int(far[beyond[0]]) if len(beyond) else None


def _nearest(parent: list[int], a: int, b: int) -> int:
    above = set()
    while a:
        above.add(a)
        a = parent[a]
    while b not in above:
        b = parent[b]
    return b


def main() -> int:
    """Reads standard input, writes one line a case; returns the exit code."""
    try:
        found = answers(sys.stdin.buffer.read())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sys.stdout.write("".join(f"{node}\n" for node in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
