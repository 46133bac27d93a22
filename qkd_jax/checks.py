"""Argument checks: every message names the argument, what came, what is allowed and the repair.

The checks raise `ValueError` at trace time (they look at Python values, shapes and dtypes, never at
array contents), so they cost nothing in a compiled step. Add a sibling as a small function that
takes the argument's name first.
"""

import difflib
import math
import numbers
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

# Names may come from files: a message is no longer than a page, and comparing long words is
# quadratic in their length.
MOST_LISTED, LONGEST_COMPARED = 100, 100


def nearest(word: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the option closest to `word`, or an empty string."""
    word, names = str(word), [str(option) for option in options]
    names = [name for name in names if len(name) <= LONGEST_COMPARED]
    if len(word) > LONGEST_COMPARED:
        return ""
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def printable(text: Any) -> str:
    """Returns text for a terminal: what would move its cursor or reverse its lines is written out.

    Names in files that somebody sent may hold such characters; lines and tabs stay.
    """
    shown = str(text)
    if shown.isascii() and shown.replace("\n", "").replace("\t", "").isprintable():
        return shown
    odd = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        f"\\u{ord(c):04x}" if c not in "\n\t" and unicodedata.category(c) in odd else c
        for c in shown
    )


def unknown(kind: str, word: str, options: Iterable[str]) -> ValueError:
    """Builds the error for a name that is not among `options` (returned, not raised)."""
    options = sorted(str(o) for o in options)
    listed = ", ".join(f"{option:.{LONGEST_COMPARED}}" for option in options[:MOST_LISTED])
    more = len(options) - MOST_LISTED
    listed += f" and {more:,} more" if more > 0 else ""
    return ValueError(
        f"unknown {kind} {word!r:.200}; allowed: {listed or '(none)'}.{nearest(word, options)}"
    )


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        hint = nearest(str(value), [str(a) for a in allowed])
        raise ValueError(
            f"{name} is {value!r}; allowed: {', '.join(repr(a) for a in allowed)}.{hint}"
        )


def name(where: str, value: Any) -> None:
    """Raises ValueError unless `value` can name a file, a part of a path and a field.

    That is: 1 to 64 of A-Z, a-z, 0-9, "_" and "-", the first of them a letter or a digit.
    """
    if not isinstance(value, str) or not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,63}", value):
        raise ValueError(
            f"{where} has the name {value!r:.200}; it names files too, so it must be 1 to 64 "
            "letters (A-Z, a-z), digits, '_' and '-', the first of them a letter or a digit."
        )


def integer_in(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises ValueError unless `value` is an integer with low <= value <= high."""
    wanted = f"an integer of at least {low}" + ("" if high is None else f" and at most {high}")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}); it must be {wanted}.")
    if int(value) < low or (high is not None and int(value) > high):
        raise ValueError(f"{name} is {value}; it must be {wanted}.")


def regular_expression(name: str, value: Any) -> None:
    """Raises ValueError unless a value is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} is {value!r}, which is no regular expression: {error}.") from None


def in_range(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a real number with low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(
            f"{name} is {value!r} ({type(value).__name__}); it must be a number in [{low}, {high}]."
        )
    if not low <= float(value) <= high:
        raise ValueError(f"{name} is {value}; it must lie in [{low}, {high}].")


def positive(name: str, value: Any) -> None:
    """Raises ValueError unless a Python number is above 0 (traced values pass)."""
    if isinstance(value, numbers.Real) and not float(value) > 0:
        raise ValueError(f"{name} is {value}; it must be greater than 0.")


def rank(name: str, array: Any, wanted: int, meaning: str) -> None:
    """Raises ValueError unless `array` has `wanted` axes; `meaning` says which, e.g. "[batch]"."""
    if len(array.shape) != wanted:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}; it must have {wanted} axes: {meaning}."
        )


def same_shape(**arrays: Any) -> None:
    """Raises ValueError unless all the named arrays have one shape."""
    shapes: Mapping[str, tuple[int, ...]] = {k: tuple(v.shape) for k, v in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{k} {v}" for k, v in shapes.items())
        raise ValueError(f"shapes differ: {listed}; they must be the same.")


def at_least_one(name: str, values: Any) -> None:
    """Raises ValueError for an empty sequence or mapping."""
    if len(values) == 0:
        raise ValueError(f"{name} is empty; give at least one.")


def list_of_batches(batches: Any) -> None:
    """Raises ValueError for one batch (an array or a dict) where a list of them is wanted."""
    if hasattr(batches, "shape") or isinstance(batches, Mapping):
        raise ValueError("batches is one batch; give a list of batches, such as [images].")


def number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    low_allowed: bool = True,
) -> None:
    """Raises ValueError unless `value` is a finite number in range, or a scalar array.

    Meant for hyper-parameters that a compiled step passes as arrays: a Python number is compared
    with `low` and `high`, an array (traced or not) is only asked to have shape ().
    """
    span = f"{'[' if low_allowed else '('}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        given = float(value)
        inside = low <= given <= high if low_allowed else low < given <= high
        if not (inside and math.isfinite(given)):
            raise ValueError(f"{name} is {value}; it must be a finite number in {span}.")
    elif not hasattr(value, "shape"):
        raise ValueError(
            f"{name} is {value!r} ({type(value).__name__}); it must be a number in {span} "
            "or a scalar array."
        )
    elif tuple(value.shape) != ():
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; it must be one number in {span}: shape ()."
        )


def named_numbers(name: str, given: Any, example: str) -> dict[str, Any]:
    """Returns {word: number} of a mapping, or of texts "word:number" such as the example.

    Texts are what a command line can override: a dict in a config takes no new keys from it.
    """
    if isinstance(given, Mapping):
        return dict(given)
    wrong = ValueError(f"{name} is {given!r}; give texts, such as ({example!r},), or a dict.")
    if given is not None and not isinstance(given, list | tuple):
        raise wrong
    found = {}
    for text in given or ():
        word, _, value = str(text).partition(":")
        try:
            found[word.strip()] = float(value)
        except ValueError:
            raise wrong from None
    return found


def vector(name: str, array: Any, length: int, meaning: str) -> None:
    """Raises ValueError unless `array` has shape (length,); `meaning` says one entry per what."""
    if tuple(array.shape) != (length,):
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}; it must be ({length},): {meaning}."
        )


def class_labels(name: str, labels: Any, logits: Any) -> None:
    """Raises ValueError unless `labels` holds one integer per row of `logits` [batch, classes]."""
    wanted = f"integers of shape ({logits.shape[0]},), one class index per row of logits"
    if labels.dtype.kind not in "iu" or tuple(labels.shape) != (logits.shape[0],):
        raise ValueError(
            f"{name} has dtype {labels.dtype} and shape {tuple(labels.shape)}; it must be {wanted} "
            f"{tuple(logits.shape)}. One-hot rows become indices with argmax(-1)."
        )


def images(name: str, array: Any) -> None:
    """Raises ValueError unless `array` is a floating [batch, height, width, channels] array."""
    rank(name, array, 4, "[batch, height, width, channels]")
    # NumPy's kind of bfloat16 and float8 is 'V'.
    if array.dtype.kind not in "fV":
        raise ValueError(
            f"{name} has dtype {array.dtype}; it must be floating: normalise the pixels "
            "first, e.g. (images / 255 - mean) / std."
        )


def rows_within(name: str, index: Any, count: int) -> None:
    """Raises ValueError unless every number of an array is a row of a table of `count` rows.

    NumPy takes -1 for the last row.
    """
    lowest, highest = (int(end(initial=0)) for end in (index.min, index.max))
    if lowest < 0 or highest >= count:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"{name} holds {wrong}; it must hold the numbers of examples, from 0 to {count - 1}."
        )
