"""Structure arguments of the configs: the text behind the colon.

`--config=configs/qkd.py:data=digits,bits=w4a4` calls `get_config("data=digits,bits=w4a4")`.
"""

import difflib
from typing import Any

from ml_collections import ConfigDict


def parse(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses the structure arguments of a config, `"k=v,k=v"`, typed by their defaults.

    A bare key (`"reduce_range"`) switches a boolean on. Booleans take true/false, yes/no, on/off
    and 1/0. The values of integers and floats are read by `int` and `float`.

    Args:
        arg: the text behind the colon of `--config=file.py:text`; None and "" mean no arguments.
        **defaults: every key that the config knows, with its default; bool, int, float or str.

    Returns:
        A `ConfigDict` with the keys of `defaults`.

    Raises:
        ValueError: for an unknown key (with the nearest known one), a key given twice, a value that
            its type cannot hold, or a bare key that is not a boolean.
    """
    values = dict(defaults)
    given = set()
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        key, has_value, text = (part.strip() for part in item.partition("="))
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown config argument {key!r}; allowed: {', '.join(sorted(defaults))}.{hint} "
                "Fields that are not structure are overridden as --config.<field>=<value>."
            )
        if key in given:
            raise ValueError(f"config argument {key!r} is given twice in {arg!r}; keep one.")
        given.add(key)
        values[key] = _typed(key, text if has_value else None, defaults[key])
    return ConfigDict(values)


def _typed(key: str, text: str | None, default: Any) -> Any:
    """Reads one argument's text as the type of its default."""
    if isinstance(default, bool):
        words = {"true": True, "yes": True, "on": True, "1": True}
        words |= {"false": False, "no": False, "off": False, "0": False}
        if text is None:
            return True
        if text.lower() not in words:
            raise ValueError(f"config argument {key} is {text!r}; write true or false.")
        return words[text.lower()]
    if not text:
        raise ValueError(f"config argument {key} has no value; write {key}={default!r}.")
    if isinstance(default, int | float):
        kind = type(default)
        try:
            return kind(text)
        except ValueError:
            wanted = "an integer" if kind is int else "a number"
            raise ValueError(
                f"config argument {key} is {text!r}; it must be {wanted}, for example "
                f"{key}={default!r}."
            ) from None
    return text
