"""A model's call: the arguments that `images` stands for, and the arrays among them.

`images` is the model's one input (any pytree of arrays), a tuple of its positional arguments, or
None where the keywords hold all. Everything that runs a model once reads it so.
"""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.errors import InvalidRngError, ModifyScopeVariableError

from qkd_jax.graph.any_batch import OWN_BATCH

_ARRAY = object()
_OF_APPLY = ("method", "rngs", "mutable", "capture_intermediates")


def call_arguments(
    model: nn.Module, method: Any, images: Any, kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Returns the positional arguments that `images` stands for.

    Args:
        model: a linen module.
        method: its method, a name or a function, or None for its call.
        images: one argument, a tuple of the positional ones, or None.
        kwargs: the call's arguments by keyword.

    Raises:
        ValueError: the call does not take them.
    """
    own = signature(model, method)
    # A named tuple is a record: one argument.
    forms = [images] if type(images) is tuple else []
    forms.append(() if images is None else (images,))
    problem = ""
    for arguments in forms:
        try:
            own.bind(*arguments, **kwargs)
        except TypeError as error:
            problem = problem or str(error)
        else:
            return arguments
    raise ValueError(
        f"model {type(model).__name__}, whose call is {type(model).__name__}{own}, can't be "
        f"called with these images: {problem}. `images` is its one input, a tuple of its "
        "positional arguments, or None; the others follow by keyword, such as train=False."
    )


def signature(model: nn.Module, method: Any) -> inspect.Signature:
    """The signature of a model's call, or of another of its methods, without `self`."""
    function = "__call__" if method is None else method
    if isinstance(function, str):
        # Of the object: a class answers with its metaclass' `__call__`.
        function = getattr(model, function, None)
    if function is None:
        raise ValueError(
            f"model {type(model).__name__} has no {method or '__call__'}; give method=<the name of "
            "the one that computes its output>."
        )
    own = inspect.signature(function)
    skipped = 0 if inspect.ismethod(function) else 1
    return own.replace(parameters=list(own.parameters.values())[skipped:])


def own_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords that a model's call takes, without those of `apply`."""
    return {name: value for name, value in kwargs.items() if name not in _OF_APPLY}


@dataclasses.dataclass(frozen=True)
class CallForm:
    """What a call's arguments are but for their arrays: hashable, as the flags among them are."""

    structure: Any
    leaves: tuple[Any, ...]  # `_ARRAY` in the place of each array

    def __call__(self, arrays: Sequence[Any]) -> Any:
        """Returns the arguments with these arrays."""
        left = iter(arrays)
        return self.structure.unflatten(
            next(left) if leaf is _ARRAY else leaf for leaf in self.leaves
        )


def split_arrays(tree: Any) -> tuple[list[Any], CallForm]:
    """Splits the arrays of a call from the flags, texts and functions that Python reads.

    Args:
        tree: a pytree; random keys and shapes count as arrays, NumPy's numbers do not.

    Returns:
        (the arrays, what makes the tree of as many other arrays).
    """
    leaves, structure = jax.tree.flatten(tree)
    traced = [hasattr(leaf, "dtype") and not isinstance(leaf, np.generic) for leaf in leaves]
    both = list(zip(leaves, traced, strict=True))
    form = CallForm(structure, tuple(_ARRAY if t else leaf for leaf, t in both))
    return [leaf for leaf, t in both if t], form


def jit_of_call(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function whose last argument is a call's arguments, flags among them static."""
    compiled = jax.jit(lambda form, arrays, *rest: fn(*rest, form(arrays)), static_argnums=0)

    def call(*args: Any) -> Any:
        arrays, form = split_arrays(args[-1])
        return compiled(form, arrays, *args[:-1])

    return call


@contextlib.contextmanager
def explaining_failures(images: Any) -> Iterator[None]:
    """Says why a call fails: its mode, its cache, or batches as `calibrate` takes them."""
    try:
        yield
    except (InvalidRngError, ModifyScopeVariableError) as error:
        collection = re.search(r'collection "(\w+)"', str(error))
        name = "" if collection is None else collection[1]
        if isinstance(error, InvalidRngError) or name == "batch_stats":
            does = "updates its running averages" if name else "draws random numbers"
            raise ValueError(
                f"the model {does}: it runs in training mode. Give the argument of its call for "
                f"evaluation, such as train=False or deterministic=True. ({error})"
            ) from error
        if name in ("", "params"):
            raise
        raise ValueError(
            f"the model writes its collection {name!r}, and nothing here allows it. Give "
            f"mutable=[{name!r}]: results are (output, {{{name!r}: ...}}), and a converted net "
            f"takes (images, {{{name!r}: ...}}). ({error})"
        ) from error
    except Exception as error:
        if isinstance(images, tuple) and isinstance(error, TypeError | AttributeError):
            raise ValueError(
                f"the model can't be called with a tuple of {len(images)}, its positional "
                f"arguments: {type(error).__name__}: {str(error).partition(chr(10))[0]}. Labels "
                "are no argument of it, and batches are a list where a function takes several."
            ) from error
        if not isinstance(images, list | dict):
            raise
        given = f"a dict of {sorted(images)}" if isinstance(images, dict) else "a list"
        raise ValueError(
            f"the model can't be called with images, which is {given}: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. Give one example input, "
            "an array or a tuple of the model's positional arguments; lists of batches and dicts "
            "with 'image' are for functions of data, such as `calibrate`."
        ) from error


def own_batch_alone(batches: Any, kwargs: Mapping[str, Any], cause: Exception) -> ValueError:
    """The error of a model that runs at its example's batch size, and not at another one."""
    why = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
    for name, value in kwargs.items():
        if any(np.shape(a)[:1] in batches for a in split_arrays(value)[0]):
            return ValueError(
                f"argument {name!r} came by keyword, and what comes by keyword is a constant: its "
                "array has the batch size of the example, and the net is to run at any. Give it "
                f"with the other inputs, images=(..., {name}), or, where the model takes it by "
                f"keyword alone, with method=lambda m, x, {name}: m(x, {name}={name}) too. ({why})"
            )
    return ValueError(
        "the model runs at the batch size of its example and not at another one, as with a "
        f"parameter of that size ({why}); {OWN_BATCH}."
    )
