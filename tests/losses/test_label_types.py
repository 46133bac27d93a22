"""Labels of any integer type are the classes that they say."""

import jax
import numpy as np
import pytest
from test_losses import BATCH, CLASSES, INPUTS, OTHER_INPUTS

from qkd_jax.losses import LOSSES, TABLE

WITH_LABELS = [name for name in LOSSES if "labels" in TABLE[name].inputs]


def _beside_labels(name, classes):
    """A loss's inputs but the labels, with logits of more classes."""
    given, more = {}, ((0, 0), (0, classes - CLASSES))
    for word in TABLE[name].inputs:
        value = OTHER_INPUTS.get(name, {}).get(word, INPUTS.get(word))
        if word.endswith("logits"):
            value = jax.tree.map(lambda z: np.pad(z, more), value)
        if word != "labels":
            given[word] = value
    return given


@pytest.mark.parametrize("name", WITH_LABELS)
def test_labels_in_small_types_count_as_they_are(name):
    given, rng = _beside_labels(name, 300), np.random.default_rng(0)
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.uint32):
        labels = rng.integers(0, min(300, np.iinfo(dtype).max + 1), BATCH)
        labels[0] = min(300, np.iinfo(dtype).max + 1) - 1
        found, want = (LOSSES[name](**given, labels=labels.astype(t)) for t in (dtype, np.int32))
        jax.tree.map(np.testing.assert_array_equal, found, want)
        assert np.isfinite(jax.tree.leaves(want)[0]).all()


@pytest.mark.parametrize("name", [n for n in WITH_LABELS if not n.startswith("crd")])
def test_a_label_in_64_bits_is_not_cut(name):
    with jax.enable_x64(True):
        labels = np.full(BATCH, 2**32 + 1, np.int64)
        assert np.isnan(LOSSES[name](**_beside_labels(name, 6), labels=labels)).all()
