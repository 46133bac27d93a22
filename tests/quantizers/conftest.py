import pathlib

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "quantizers.npz"


@pytest.fixture(scope="session")
def quantizer_golden():
    """Golden arrays of one group, as `quantizer_golden("lsq/int4")["dx"]`."""
    arrays = dict(np.load(GOLDEN))

    def group(prefix):
        return {
            k.removeprefix(f"{prefix}/"): v for k, v in arrays.items() if k.startswith(f"{prefix}/")
        }

    return group
