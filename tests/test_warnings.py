"""What a library is about to take away is an error, in tests and in programs that they start."""

import subprocess
import sys
import warnings

import pytest

CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
# Python itself shows a deprecation in the main program alone; this one is raised in a library.
CODE = "import warnings; warnings.warn_explicit('old', {}, 'jax/old.py', 1, module={!r})"


@pytest.mark.parametrize("library", ["jax._src.api", "flax.linen.module", "optax"])
@pytest.mark.parametrize("category", CATEGORIES)
def test_a_deprecation_is_an_error_in_tests(category, library):
    with pytest.raises(category, match="old"):
        warnings.warn_explicit("old", category, "old.py", 1, module=library)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_deprecation_is_an_error_in_a_program(category):
    code = CODE.format(category.__name__, "jax._src.api")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and f"{category.__name__}: old" in done.stderr
