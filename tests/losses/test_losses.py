"""What every entry of LOSSES must satisfy, driven by its signature.

A new entry is covered without another line here, as long as its positional arguments are among
`INPUTS`. Its keyword-only hyper-parameters are tried at their defaults.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import losses
from qkd_jax.losses import LOSSES, TABLE, crd_memory

BATCH, CLASSES = 8, 5


def _normal(seed, *shape, scale=1.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal((BATCH, *shape))).astype(np.float32)


# Positional argument -> an input of BATCH examples, or what is shared by all of them.
INPUTS = {
    "logits": _normal(0, CLASSES, scale=3),
    "student_logits": _normal(0, CLASSES, scale=3),
    "teacher_logits": _normal(1, CLASSES, scale=3),
    "teachers_logits": (_normal(1, CLASSES, scale=3), _normal(12, CLASSES, scale=3)),
    "temperature": np.float32(2.5),
    "labels": np.array([0, 4, 2, 2, 1, 3, 0, 4], np.int32),
    "student_feature": _normal(2, 4, 3, 3),
    "teacher_feature": _normal(3, 4, 3, 3),
    "gate": np.full((BATCH, 3), (0.2, 0.3, 0.5), np.float32),
    "heads_logits": (_normal(13, CLASSES, scale=3), _normal(14, CLASSES, scale=3)),
    "student_features": (_normal(4, 4, 4, 3), _normal(5, 2, 2, 5)),
    "teacher_features": (_normal(6, 4, 4, 3), _normal(7, 2, 2, 5)),
    "student_embedding": _normal(8, 6),
    "teacher_embedding": _normal(9, 6),
    "variances": (np.float32([1.5, 2.0, 3.0]), np.float32([0.5, 1.0, 2.0, 3.0, 4.0])),
    "margins": (np.full(3, -0.4, np.float32), np.full(5, -0.7, np.float32)),
    "index": np.array([3, 9, 0, 11, 7, 5, 1, 8], np.int32),
    "memory": crd_memory(12, 6, key=jax.random.key(1), labels=np.arange(12) % CLASSES)
    | {"started": np.array(True), "log_z": np.array([3.0, 2.5], np.float32)},
    "key": jax.random.key(2),
    "attention": np.full((BATCH, 2, 2), 0.5, np.float32),
}
# Losses whose input of a name has another structure.
OTHER_INPUTS = {
    "semckd": {
        "student_features": (
            (_normal(4, 4, 4, 3), _normal(5, 2, 2, 5)),
            (_normal(10, 4, 4, 3), _normal(11, 2, 2, 5)),
        )
    },
    "byot": {
        "student_features": (_normal(4, 6), _normal(5, 6)),
        "teacher_feature": _normal(6, 6),
    },
}
SHARED = ("temperature", "variances", "margins", "memory", "key")
LEARNERS = (
    *("logits", "student_logits", "heads_logits"),
    *("student_feature", "student_features", "student_embedding"),
)
DETACHED = ("teacher_logits", "teachers_logits", "teacher_feature", "teacher_features", "margins")
# Not 0 at student = teacher: cross-entropies, a likelihood, a margin, contrast with others.
NO_DISTANCE = (
    "ce",
    "nkd",
    "hard_target",
    "tf_kd",
    "apprentice",
    "hxe",
    "tree_soft_labels",
    "lca_alignment",
    "byot",
    "one",
    "vid",
    "ab",
    "crd",
    "crd_in_batch",
)
# The gradient is not the value's: reversed on purpose, or a detached target is made of the same
# inputs (its closed form is in test_heads_losses.py).
REVERSED = {"ctkd": ("temperature",), "one": ("logits", "heads_logits", "gate")}
# A sum of absolute values: at equality its gradient has the sign of rounding errors.
KINKED = ("ft",)
# The order of the batch means something to it.
ORDERED = ("cc_adjacent",)

pytestmark = pytest.mark.parametrize("name", LOSSES)
COUPLED = {n for n in LOSSES if "axis_name" in TABLE[n].keywords}


def signature(name):
    """Returns the positional names and the hyper-parameters with their defaults."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    hyper = {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in ("where", "axis_name")
    }
    return positional, hyper


def arguments(name, **replace):
    missing = [p for p in signature(name)[0] if p not in INPUTS]
    assert not missing, f"{name} takes {missing}: give INPUTS an array of that name."
    inputs = INPUTS | OTHER_INPUTS.get(name, {}) | replace
    return {p: inputs[p] for p in signature(name)[0]}


def equal_nets(name):
    """Arguments with which the student gives what the teacher gives."""
    args = arguments(name)
    for argument in args:
        twin = args.get(argument.replace("student_", "teacher_"))
        if "teachers_logits" in args and argument == "student_logits":
            args["teachers_logits"] = (args[argument],) * 2
        elif argument in LEARNERS and twin is not None:
            nested = isinstance(args[argument], tuple) and isinstance(args[argument][0], tuple)
            args[argument] = (twin,) * len(args[argument]) if nested else twin
    return args


def values(name, *args, **keywords):
    """The loss without its new memory."""
    found = LOSSES[name](*args, **keywords)
    return found[0] if TABLE[name].memory else found


def per_example(args, function):
    """Applies `function` to every array that has a row per example."""
    return {k: v if k in SHARED else jax.tree.map(function, v) for k, v in args.items()}


def learner(name):
    """The argument that gradients flow into."""
    return next(p for p in signature(name)[0] if p in LEARNERS)


def floating(args):
    return {
        k: v
        for k, v in args.items()
        if all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(v))
    }


def value_and_gradients(name, args, where, **keywords):
    """Values and the gradients of their sum for every floating argument but the memory."""
    moving = {k: v for k, v in floating(args).items() if k != "memory"}
    rest = {k: v for k, v in args.items() if k not in moving}

    def total(moving):
        value = values(name, **moving, **rest, where=where, **keywords)
        return jnp.sum(value), value

    grads, value = jax.grad(total, has_aux=True)(moving)
    return value, grads


# Most of a test is compilation, and XLA's optimizations are most of that.
compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(name):
    return compile_fast(functools.partial(value_and_gradients, name))


def run(name, args, where=None):
    """`value_and_gradients`, compiled once for all tests whose shapes are the same."""
    rows = jax.tree.leaves(args[learner(name)])[0].shape[0]
    return compiled(name)(args, np.ones(rows, bool) if where is None else where)


def assert_close(found, wanted, rtol, atol):
    """`atol` is relative to the largest number of an array."""
    leaves = jax.tree.leaves(found), jax.tree.leaves(wanted)
    for a, b in zip(*leaves, strict=True):
        size = np.abs(b).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * size)


def test_is_public_and_follows_the_signature_rules(name):
    assert getattr(losses, name) is LOSSES[name]
    assert name in losses.__all__
    positional, hyper = signature(name)
    parameters = inspect.signature(LOSSES[name]).parameters
    assert list(parameters)[-1] == "where" and parameters["where"].default is None
    assert name not in COUPLED or parameters["axis_name"].default is None
    assert all(parameters[p].default is inspect.Parameter.empty for p in positional)
    assert all(default is not inspect.Parameter.empty for default in hyper.values())
    assert learner(name) == positional[0]
    assert ("memory" in positional) == (TABLE[name].memory is not None)


def test_docstring_is_complete(name):
    text = inspect.getdoc(LOSSES[name])
    for part in inspect.signature(LOSSES[name]).parameters:
        assert f"{part}: " in text, f"document {part}"
    for section in ("Args:", "Returns:", "Raises:", "Reference:"):
        assert section in text
    assert any(source in text for source in ("arXiv", "CVPR", "ICCV"))


def test_one_finite_float32_value_per_example(name):
    value, _ = run(name, arguments(name))
    assert value.shape == (BATCH,) and value.dtype == jnp.float32
    assert np.isfinite(value).all() and (np.asarray(value) >= 0).all()


def test_eager_equals_compiled_with_and_without_a_mask(name):
    args = arguments(name)
    value, _ = run(name, args)
    np.testing.assert_allclose(values(name, **args), value, rtol=1e-5, atol=1e-6)


def test_hyper_parameters_may_be_traced(name):
    args = arguments(name)
    hyper = {k: v for k, v in signature(name)[1].items() if isinstance(v, float)}
    if not hyper:
        pytest.skip("has none")
    traced = {k: jnp.float32(v) for k, v in hyper.items()}
    value = compile_fast(functools.partial(values, name))(**args, **traced)
    np.testing.assert_allclose(value, run(name, args)[0], rtol=1e-5, atol=1e-6)


def test_the_order_of_the_batch_does_not_matter(name):
    if name in ORDERED:
        pytest.skip("relates neighbours")
    order = np.array([3, 0, 7, 5, 1, 4, 6, 2])
    whole, _ = run(name, arguments(name))
    permuted, _ = run(name, per_example(arguments(name), lambda a: a[order]))
    # Sums are taken in another order.
    np.testing.assert_allclose(permuted, whole[order], rtol=1e-5)


def test_examples_touch_each_other_only_where_the_loss_says_so(name):
    whole, _ = run(name, arguments(name))
    alone, _ = run(name, per_example(arguments(name), lambda a: a[2:3]))
    if name in COUPLED:
        assert not np.allclose(alone, whole[2:3], rtol=1e-3)
    else:
        np.testing.assert_allclose(alone, whole[2:3], rtol=2e-6)


def test_no_gradient_to_the_teacher(name):
    _, grads = run(name, arguments(name))
    for argument, grad in grads.items():
        if argument in DETACHED:
            assert not any(np.any(g) for g in jax.tree.leaves(grad)), argument
        else:
            assert all(np.any(g) for g in jax.tree.leaves(grad)), argument


def test_gradients_equal_finite_differences(name):
    args = arguments(name)
    _, grads = run(name, args)
    skipped = DETACHED + REVERSED.get(name, ())
    grads = {k: g for k, g in grads.items() if k not in skipped}
    if not grads:
        pytest.skip("every gradient is on purpose another than the value's")
    moving = {k: args[k] for k in grads}
    rng = np.random.default_rng(7)
    step = jax.tree.map(lambda a: rng.standard_normal(a.shape), moving)
    parts = jax.tree.leaves(jax.tree.map(lambda g, d: np.float64(g) * d, grads, step))
    with jax.enable_x64(True):
        h = 1e-5
        fixed = {k: v for k, v in args.items() if k not in moving}
        function = compile_fast(lambda moving: jnp.sum(values(name, **moving, **fixed)))
        ends = [
            function(jax.tree.map(lambda a, d, h=h: a.astype(np.float64) + h * d, moving, step))
            for h in (h, -h)
        ]
        assert ends[0].dtype == jnp.float64
        wanted = (ends[0] - ends[1]) / (2 * h)
    # The summands may cancel: float32 gradients are exact to some roundings of their sizes.
    size = sum(np.abs(part).sum() for part in parts)
    np.testing.assert_allclose(sum(p.sum() for p in parts), wanted, rtol=2e-5, atol=2e-6 * size)


def test_a_distance_is_zero_at_equality(name):
    if name in NO_DISTANCE:
        pytest.skip("no minimum of 0 at student = teacher")
    value, grads = run(name, equal_nets(name))
    np.testing.assert_allclose(value, np.zeros(BATCH), atol=1e-6)
    if name in KINKED:
        return
    # Some float32 roundings of sums that cancel; dkd's are of T beta = 32 times a probability.
    for grad in jax.tree.leaves(grads[learner(name)]):
        np.testing.assert_allclose(grad, 0.0, atol=4e-6)


def extreme(name, batch, classes=CLASSES):
    """Inputs of size 1e4: nets that are certain of unlike classes, features of like sign."""
    row = np.full((batch, classes), -1e4, np.float32)
    row[:, 0] = 1e4
    args = per_example(arguments(name), lambda a: a[:batch])
    for argument, array in args.items():
        if argument.endswith("logits"):
            logits = row[:, ::-1].copy() if argument.startswith("teacher") else row
            args[argument] = jax.tree.map(lambda a, logits=logits: logits, array)
        elif argument in LEARNERS + DETACHED:
            args[argument] = jax.tree.map(lambda a: np.float32(1e4) * np.sign(a), array)
        elif argument == "labels":
            args[argument] = np.full(batch, classes - 1, np.int32)
    return args


def assert_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("batch", [1, BATCH])
def test_finite_at_extreme_inputs(name, batch):
    assert_finite(run(name, extreme(name, batch)))


def test_finite_with_two_classes(name):
    if not any("logits" in p for p in signature(name)[0]):
        pytest.skip("knows no classes")
    assert_finite(run(name, extreme(name, 1, classes=2)))


@pytest.mark.parametrize("batch", [0, 1, BATCH])
def test_finite_where_everything_is_equal(name, batch):
    args = per_example(arguments(name), lambda a: np.zeros_like(a[:batch]))
    assert_finite(run(name, args))


def test_bfloat16_is_widened_before_any_arithmetic(name):
    args = arguments(name)

    def cast(args, dtype):
        moving = {k: v for k, v in floating(args).items() if k not in SHARED}
        return args | {
            k: jax.tree.map(lambda a: jnp.asarray(a, dtype), v) for k, v in moving.items()
        }

    low = cast(args, jnp.bfloat16)
    value, grads = run(name, low)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, run(name, cast(low, jnp.float32))[0])
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads[learner(name)]))


MASK = np.array([1, 0, 1, 0, 0, 1, 1, 0], bool)


def spoil(a):
    """NaN, Inf and indices out of range in the rows that `MASK` hides."""
    a = np.array(a)
    if a.dtype.kind in "iu":
        a[~MASK] = (-1, 99, 99, -1)
    else:
        a[~MASK] = np.array((np.nan, np.inf, -np.inf, np.nan)).reshape(4, *(1,) * (a.ndim - 1))
    return a


def test_where_hides_an_example_completely(name):
    """What is left is what a batch without the hidden examples gives."""
    args = arguments(name)
    value, grads = run(name, per_example(args, spoil), MASK)
    want, wanted = run(name, per_example(args, lambda a: a[MASK]))
    assert not np.any(value[~MASK])
    assert_close(value[MASK], want, 1e-5, 1e-6)
    for argument in grads:
        if argument in SHARED:
            assert_close(grads[argument], wanted[argument], 1e-5, 1e-6)
            continue
        for found, one in zip(
            jax.tree.leaves(grads[argument]), jax.tree.leaves(wanted[argument]), strict=True
        ):
            assert not np.any(found[~MASK])
            assert_close(found[MASK], one, 1e-5, 1e-6)


def test_a_mask_may_be_floating(name):
    if name in COUPLED:
        pytest.skip("goes through the same check as bool")
    args = arguments(name)
    value = compile_fast(functools.partial(values, name))(**args, where=MASK.astype(np.float32))
    assert_close(value, run(name, args, MASK)[0], 1e-6, 0)


def test_nothing_is_kept_when_where_is_all_false(name):
    value, grads = run(name, arguments(name), np.zeros(BATCH, bool))
    assert not np.any(value)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_four_devices_give_what_one_gives(name):
    """Values, and gradients of the sum over devices of each device's own rows."""
    if name not in COUPLED:
        pytest.skip("examples do not touch each other")
    assert jax.device_count() == 4
    args = arguments(name)

    def of_one_device(spread, shared, mask):
        return value_and_gradients(name, {**spread, **shared}, mask, axis_name="batch")

    mapped = jax.pmap(of_one_device, axis_name="batch")
    split = functools.partial(jax.tree.map, lambda a: a.reshape(4, -1, *a.shape[1:]))
    # Every device has its own copy of what is shared, so that gradients are told apart.
    shared = {
        k: jax.tree.map(lambda a: jnp.stack([a] * 4), v) for k, v in args.items() if k in SHARED
    }
    spread = {k: v for k, v in args.items() if k not in SHARED}
    for mask in (np.ones(BATCH, bool), MASK):
        value, grads = mapped(split(spread), shared, split(mask))
        joined = {
            k: jax.tree.map(
                lambda g, k=k: g.sum(0) if k in SHARED else g.reshape(-1, *g.shape[2:]), v
            )
            for k, v in grads.items()
        }
        # Sums over pairs of examples run in another order, and gradients of distances cancel in
        # them: 32 roundings of float32 are 4e-6 of the largest number.
        assert_close((value.reshape(-1), joined), run(name, args, mask), 1e-5, 4e-6)


def test_wrong_shapes_are_named(name):
    args = arguments(name)

    def shapes_of(args):
        return jax.eval_shape(functools.partial(values, name), **args)

    for argument, array in args.items():
        if argument in SHARED:
            continue
        for wrong in (lambda a: a[:-1], lambda a: a[..., None]):
            with pytest.raises(ValueError, match=argument):
                shapes_of(args | {argument: jax.tree.map(wrong, array)})
    with pytest.raises(ValueError, match="where"):
        shapes_of(args | {"where": np.ones(BATCH + 1)})


def test_hyper_parameters_are_validated(name):
    for parameter, default in signature(name)[1].items():
        if isinstance(default, float):
            for wrong in (-1.0, float("nan"), float("inf"), "4", np.ones(2)):
                with pytest.raises(ValueError, match=parameter):
                    LOSSES[name](**arguments(name), **{parameter: wrong})
