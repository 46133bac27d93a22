"""A trained net as integers, on the whole test split of the digits: no code differs.

`pytest -m slow -s tests/deploy/integer/test_digits.py` prints the counts of docs/results.md.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_convert import differing, fake_quantized

from qkd_jax import data, models
from qkd_jax.deploy import convert, integer_apply, onnx_session, to_onnx
from qkd_jax.ptq import fold_bn
from qkd_jax.quantize import quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.presets import rules
from qkd_jax.training.parallel import compile_step
from qkd_jax.training.plan import plan_step
from qkd_jax.training.state import net_variables, start_state
from qkd_jax.training.step import make_step

STEPS = 150


def trained(net, variables, batches, lr):
    learn, optim = {"net": {"ce": {}}}, {"net": {"name": "sgd", "lr": lr, "schedule": "cosine"}}
    plan = plan_step({"net": net}, learn, optim, horizon=STEPS)
    step = compile_step(make_step(plan.structure), devices=jax.devices()[:1])
    state = start_state(plan, {"net": variables}, step=0, seed=0)
    for place in range(STEPS):
        state, _ = step(state, batches[place], {})
    return jax.device_get(net_variables(plan, state)["net"])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w2a2", "w4a4", "w8a8"])
def test_no_code_differs_on_the_whole_test_split(preset, tmp_path):
    dataset = data.load("digits", train_examples=300, seed=0)
    batches = data.train_batches(dataset, batch_size=64, seed=0, augment=("shift:1",))
    model, images = models.create("resnet8", 10, width=8), batches[0]["image"]
    floats, net = quantize(model), quantize(model, rules(preset))
    variables = trained(floats, jax.jit(floats.init)(jax.random.key(0), images), batches, 0.1)
    variables = trained(net, calibrate(net, variables, [images]), batches, 0.02)

    test = dataset.normalize(dataset.test_images)
    assert len(test) == 1497
    integer = convert(net, variables, images)
    logits, codes = fake_quantized(net, fold_bn(net, variables, images), test)
    as_trained, unfolded = fake_quantized(net, variables, test)
    accuracy = np.mean(np.argmax(as_trained, 1) == dataset.test_labels)
    assert accuracy > 0.9  # a trained net, not noise
    for formulation in ("int32", "float32"):
        out, found = integer_apply(integer, test, capture=True, formulation=formulation)
        assert differing(codes, found) == 0
        np.testing.assert_array_equal(out, logits)

    # Folding moves values by a unit in the last place: ties between two codes may fall otherwise.
    total, flipped = sum(c.size for c in found.values()), differing(unfolded, found)
    assert flipped <= 1e-3 * total
    path = tmp_path / "net.onnx"
    to_onnx(net, variables, images, path)
    session = onnx_session(path)
    (engine,) = session.run(None, {"images": np.transpose(test, (0, 3, 1, 2))})
    agreement = np.mean(np.argmax(engine, 1) == np.argmax(as_trained, 1))
    assert agreement >= 0.995
    print(
        f"\n{preset}: top-1 {accuracy:.4f}, {total:,} codes, 0 differ from the folded net, "
        f"{flipped} from the net as trained; ONNX Runtime argmax agreement {agreement:.4f}"
    )
