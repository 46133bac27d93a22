"""What every entry of LOSSES must satisfy, driven by its signature.

A new entry is covered without another line here, as long as its positional arguments are among
`INPUTS`. Its keyword-only hyper-parameters are tried at their defaults.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import losses
from qkd_jax.losses import LOSSES

BATCH, CLASSES = 6, 5


def _normal(seed, scale=3.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal((BATCH, CLASSES))).astype(np.float32)


# Positional argument -> an input of BATCH examples.
INPUTS = {
    "logits": _normal(0),
    "student_logits": _normal(0),
    "teacher_logits": _normal(1),
    "labels": np.array([0, 4, 2, 2, 1, 3], np.int32),
}

pytestmark = pytest.mark.parametrize("name", LOSSES)


def signature(name):
    """Returns the positional names and the hyper-parameters with their defaults."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    hyper = {
        p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "where"
    }
    return positional, hyper


def arguments(name, **replace):
    missing = [p for p in signature(name)[0] if p not in INPUTS]
    assert not missing, f"{name} takes {missing}: give INPUTS an array of that name."
    return {p: replace.get(p, INPUTS[p]) for p in signature(name)[0]}


def learner(name):
    """The argument that gradients flow into."""
    return next(p for p in signature(name)[0] if p == "logits" or p.startswith("student_"))


def gradients(name, args, **keywords):
    """Gradients of the summed loss for every floating argument."""
    floating = {k: jnp.asarray(v) for k, v in args.items() if k != "labels"}
    rest = {k: v for k, v in args.items() if k == "labels"}
    return jax.grad(lambda a: jnp.sum(LOSSES[name](**a, **rest, **keywords)))(floating)


def test_is_public_and_follows_the_signature_rules(name):
    assert getattr(losses, name) is LOSSES[name]
    assert name in losses.__all__
    positional, hyper = signature(name)
    parameters = inspect.signature(LOSSES[name]).parameters
    assert list(parameters)[-1] == "where" and parameters["where"].default is None
    assert all(parameters[p].default is inspect.Parameter.empty for p in positional)
    assert all(default is not inspect.Parameter.empty for default in hyper.values())
    assert learner(name) == positional[0]


def test_docstring_is_complete(name):
    text = inspect.getdoc(LOSSES[name])
    for part in (*signature(name)[0], *signature(name)[1]):
        assert f"{part}: " in text, f"document {part}"
    for section in ("Args:", "Returns:", "Raises:", "Reference:", "arXiv"):
        assert section in text


def test_one_finite_float32_value_per_example(name):
    value = LOSSES[name](**arguments(name))
    assert value.shape == (BATCH,) and value.dtype == jnp.float32
    assert np.isfinite(value).all() and (np.asarray(value) >= 0).all()


def test_examples_do_not_touch_each_other(name):
    whole = LOSSES[name](**arguments(name))
    order = np.array([3, 0, 5, 1, 4, 2])
    permuted = {k: v[order] for k, v in arguments(name).items()}
    np.testing.assert_allclose(LOSSES[name](**permuted), whole[order], rtol=1e-6)
    alone = {k: v[2:3] for k, v in arguments(name).items()}
    np.testing.assert_allclose(LOSSES[name](**alone), whole[2:3], rtol=1e-6)


def test_no_gradient_to_the_teacher(name):
    grads = gradients(name, arguments(name))
    assert np.any(grads[learner(name)] != 0)
    for argument, grad in grads.items():
        if argument.startswith("teacher_"):
            assert not np.any(grad), argument


def test_gradient_equals_a_finite_difference(name):
    args = arguments(name)
    direction = _normal(7, scale=1.0)
    slope = jnp.sum(gradients(name, args)[learner(name)] * direction)
    with jax.enable_x64(True):
        h = 1e-5
        ends = []
        for sign in (1, -1):
            moved = args[learner(name)].astype(np.float64) + sign * h * direction
            ends.append(jnp.sum(LOSSES[name](**args | {learner(name): moved})))
        assert ends[0].dtype == jnp.float64
        wanted = (ends[0] - ends[1]) / (2 * h)
    np.testing.assert_allclose(slope, wanted, rtol=2e-5)


def test_a_distance_is_zero_at_equality(name):
    positional, _ = signature(name)
    if name in ("ce", "nkd", "hard_target"):
        pytest.skip("a cross-entropy: no minimum at student = teacher")
    same = {p: INPUTS.get(p.replace("teacher_", "student_"), INPUTS[p]) for p in positional}
    np.testing.assert_allclose(LOSSES[name](**same), np.zeros(BATCH), atol=1e-6)
    np.testing.assert_allclose(gradients(name, same)[learner(name)], 0.0, atol=1e-6)


@pytest.mark.parametrize("classes", [2, CLASSES])
def test_finite_at_extreme_logits(name, classes):
    row = np.full((1, classes), -1e4, np.float32)
    row[0, 0] = 1e4
    args = {"logits": row, "student_logits": row, "teacher_logits": row[:, ::-1].copy()}
    args = arguments(name, **args, labels=np.array([classes - 1], np.int32))
    assert np.isfinite(LOSSES[name](**args)).all()
    assert all(np.isfinite(g).all() for g in gradients(name, args).values())


def test_bfloat16_is_widened_before_any_arithmetic(name):
    low = {k: v if k == "labels" else jnp.asarray(v, jnp.bfloat16) for k, v in INPUTS.items()}
    high = {k: v if k == "labels" else v.astype(jnp.float32) for k, v in low.items()}
    value = LOSSES[name](**arguments(name, **low))
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, LOSSES[name](**arguments(name, **high)))
    grads = gradients(name, arguments(name, **low))
    assert grads[learner(name)].dtype == jnp.bfloat16


def test_jit_with_traced_hyper_parameters_equals_eager(name):
    args = arguments(name)
    hyper = {k: v for k, v in signature(name)[1].items() if isinstance(v, float)}
    traced = {k: jnp.float32(v) for k, v in hyper.items()}
    compiled = jax.jit(LOSSES[name])(**args, **traced)
    np.testing.assert_allclose(compiled, LOSSES[name](**args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_where_hides_an_example_completely(name, dtype):
    mask = np.array([1, 0, 1, 1, 0, 1], dtype)
    clean = LOSSES[name](**arguments(name))
    spoiled = {k: v.copy() for k, v in arguments(name).items()}
    for argument, array in spoiled.items():
        array[1] = -1 if argument == "labels" else np.nan
        array[4] = 99 if argument == "labels" else np.inf
    value = LOSSES[name](**spoiled, where=mask)
    np.testing.assert_allclose(value, np.where(mask, clean, 0.0), rtol=1e-6)
    grad = gradients(name, spoiled, where=mask)[learner(name)]
    wanted = gradients(name, arguments(name))[learner(name)]
    np.testing.assert_allclose(grad, np.where(mask[:, None], wanted, 0.0), rtol=1e-5, atol=1e-7)


def test_nothing_is_kept_when_where_is_all_false(name):
    none = np.zeros(BATCH, bool)
    assert not np.any(LOSSES[name](**arguments(name), where=none))
    assert not np.any(gradients(name, arguments(name), where=none)[learner(name)])


def test_wrong_shapes_are_named(name):
    for argument, array in arguments(name).items():
        with pytest.raises(ValueError, match=argument):
            LOSSES[name](**arguments(name, **{argument: array[:-1]}))
        with pytest.raises(ValueError, match=argument):
            LOSSES[name](**arguments(name, **{argument: array[..., None]}))
    with pytest.raises(ValueError, match="where"):
        LOSSES[name](**arguments(name), where=np.ones(BATCH + 1))


def test_hyper_parameters_are_validated(name):
    for parameter, default in signature(name)[1].items():
        if isinstance(default, float):
            for wrong in (-1.0, float("nan"), float("inf"), "4", np.ones(2)):
                with pytest.raises(ValueError, match=parameter):
                    LOSSES[name](**arguments(name), **{parameter: wrong})
