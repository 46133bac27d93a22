"""Method interceptors that `nn.jit` cannot pass by.

`nn.jit` keeps what it has traced of a module and its variables, whatever intercepted the calls
then: a part of one net would run as another net had it, or in another mode. Of all that may differ
it keeps apart the filters of mutable collections, so these name the interceptors, as a collection
that no module has.
"""

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import flax.linen as nn
from flax.core.scope import DenyList, union_filters

_active: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar("active", default=())
_numbers = itertools.count()


@contextlib.contextmanager
def intercepting(function: Callable[..., Any], shared: Hashable | None = None) -> Iterator[None]:
    """Opens `nn.intercept_methods`; the module's `mutable` inside is that of `naming_interceptors`.

    Args:
        function: the interceptor.
        shared: interceptors of equal values make the same of a module, so that what one of them has
            traced serves all; None where the interceptor must see each call itself.
    """
    number = next(_numbers) if shared is None else _number(shared)
    token = _active.set((*_active.get(), number))
    try:
        with nn.intercept_methods(function):
            yield
    finally:
        _active.reset(token)


@functools.lru_cache(maxsize=1024)
def _number(shared: Hashable) -> int:
    return next(_numbers)


def naming_interceptors(mutable: Any) -> Any:
    """Returns a filter of mutable collections, never False, that names the open interceptors too.

    Args:
        mutable: as `nn.Module.apply` and `init` take it.
    """
    name = f"interceptors {_active.get()}"
    if mutable is True:
        return DenyList(name)
    if isinstance(mutable, DenyList):
        return DenyList(union_filters(mutable.deny, name))
    names = [mutable] if isinstance(mutable, str) else list(mutable or ())
    return [*names, name]
