"""Method interceptors that `nn.jit` cannot pass by."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import flax.linen as nn
import jax

_ACTIVE = jax.make_user_context(())  # a part of the keys of JAX's caches
_numbers = itertools.count()


@contextlib.contextmanager
def intercepting(function: Callable[..., Any], shared: Hashable | None = None) -> Iterator[None]:
    """Opens `nn.intercept_methods`, for models with `nn.jit` too.

    `nn.jit` keeps what it has traced of a module and its variables, whatever intercepted the calls
    then: a part of one net would run as another net had it, or in another mode.

    Args:
        function: the interceptor.
        shared: interceptors of equal values make the same of a module, so that what one of them has
            traced serves all; None where the interceptor must see each call itself.
    """
    number = next(_numbers) if shared is None else _number(shared)
    with _ACTIVE((*_ACTIVE.value, number)), nn.intercept_methods(function):
        yield


@functools.lru_cache(maxsize=1024)
def _number(shared: Hashable) -> int:
    return next(_numbers)
