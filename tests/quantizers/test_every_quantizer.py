"""What every entry of QUANTIZERS must do, over formats and granularities."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qkd_jax import numerics, quantizers
from qkd_jax.numerics import Spec
from qkd_jax.quantizers import QUANTIZERS

SHAPE = (8, 5, 3)
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)


def accepted(bits):
    """Every spec of these bits that its quantizer takes."""
    specs = []
    for name in QUANTIZERS:
        # A quantizer that takes none of these widths (binary, ternary) is tried at its own.
        specs += taken(name, bits) or taken(name, range(1, 17))
    assert {s.quantizer for s in specs} == set(QUANTIZERS)
    return specs


@functools.cache
def taken(name, bits):
    specs = []
    for fields in itertools.product(bits, (True, False), (True, False), ("tensor", "channel")):
        fields = dict(zip(("bits", "signed", "symmetric", "granularity"), fields, strict=True))
        try:
            spec = Spec(quantizer=name, **fields)
            quantizers.check(spec)
        except ValueError:
            continue
        specs.append(spec)
    return specs


@functools.cache
def is_live(spec):
    """Whether the grid is a function of the tensor itself (weights of DoReFa, XNOR, TWN)."""
    x, _, params = start(spec)
    moved = quantizers.live(2 * x, params, spec)
    return any(np.any(moved[k] != params[k]) for k in params)


@functools.cache
def has_view(spec):
    """Whether the grid is uniform, so that values are integer codes times a scale."""
    _, module, params = start(spec)
    return module.integer_view(params, spec) is not None


def is_odd(spec):
    """Whether the codes are the odd ones, so that zero lies between two of them."""
    _, module, params = start(spec)
    return has_view(spec) and module.integer_view(params, spec)[2].bits > spec.bits


def over(*bits, keep=lambda spec: True):
    params = [
        pytest.param(
            spec,
            id=spec.label.replace(" ", "-"),
            marks=[pytest.mark.slow] if spec.bits in (6, 12) else [],
        )
        for spec in accepted(bits)
        if keep(spec)
    ]
    return pytest.mark.parametrize("spec", params)


def data(spec, shape=SHAPE, seed=0):
    x = np.random.default_rng(seed).normal(0.1, 1.0, shape).astype(np.float32)
    return jnp.asarray(x if spec.signed or not spec.symmetric else abs(x))


def channels(spec):
    return (2,) if spec.granularity == "channel" else ()


def fresh(spec, x):
    """The quantizer and its first parameters for `x`."""
    module = QUANTIZERS[spec.quantizer]
    stats = numerics.finish(numerics.measure(x, channel_axes=channels(spec)))
    return module, module.init(stats, spec)


@functools.cache
def sample(both_signs, channel_axes):
    """The data of `start` and their statistics."""
    x = data(Spec(4, signed=both_signs))
    return x, numerics.finish(numerics.measure(x, channel_axes=channel_axes))


@functools.cache
def start(spec):
    """Data, the quantizer and its first parameters: `over` asks them of every spec."""
    x, stats = sample(spec.signed or not spec.symmetric, channels(spec))
    module = QUANTIZERS[spec.quantizer]
    return x, module, module.init(stats, spec)


def same(spec, found, wanted):
    """Equal bit for bit; a grid that is itself a sum over the tensor may differ in its last bit."""
    if is_live(spec):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    else:
        np.testing.assert_array_equal(found, wanted)


def weights(x):
    """An upstream gradient without symmetry."""
    return jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)


def gradients(module, spec, x, params, **kw):
    w = weights(x)

    def loss(x, params):
        return jnp.sum(w * module.fake_quant(x, params, spec, **kw).astype(jnp.float32))

    return jax.grad(loss, (0, 1))(x, params)


@over(*WIDTHS, keep=lambda spec: not has_view(spec))
def test_a_grid_that_is_not_uniform_is_still_a_projection(spec):
    x, module, params = start(spec)
    assert {p.dtype for p in params.values()} == {jnp.dtype(jnp.float32)}
    x_hat = module.fake_quant(x, params, spec)
    assert x_hat.shape == x.shape and x_hat.dtype == x.dtype
    for part in jnp.moveaxis(x_hat, 2, 0) if spec.granularity == "channel" else [x_hat]:
        assert len(np.unique(part)) <= 2**spec.bits  # of one scale
    np.testing.assert_allclose(module.fake_quant(x_hat, params, spec), x_hat, rtol=1e-6)
    np.testing.assert_array_equal(module.fake_quant(jnp.zeros_like(x), params, spec), 0.0)
    ramp = jnp.linspace(-5, 5, x.size).reshape(3, 8, 5).transpose(1, 2, 0)
    ordered = np.asarray(module.fake_quant(ramp, params, spec)).transpose(2, 0, 1)
    assert np.all(np.diff(ordered.reshape(3, -1)) >= 0)


@over(*WIDTHS, keep=has_view)
def test_x_hat_lies_on_the_grid_of_the_integer_view(spec):
    x, module, params = start(spec)
    wanted = (1, 1, 3) if spec.granularity == "channel" else ()
    assert {p.shape for p in params.values()} == {wanted}
    assert {p.dtype for p in params.values()} == {jnp.dtype(jnp.float32)}

    x_hat = module.fake_quant(x, params, spec)
    assert x_hat.shape == x.shape and x_hat.dtype == x.dtype
    grid = module.integer_view(quantizers.live(x, params, spec), spec)
    assert isinstance(grid, numerics.Grid)
    scale, zero_point, form = grid
    assert form.bits == spec.bits + is_odd(spec) and form.signed == spec.signed
    assert scale.shape == zero_point.shape == wanted and np.all(scale > 0)

    centred = numerics.codes_of(x_hat, scale)
    codes = np.asarray(centred + zero_point)
    assert codes.min() >= form.qmin and codes.max() <= form.qmax
    np.testing.assert_array_equal(codes.astype(form.storage), codes)
    np.testing.assert_array_equal(x_hat, centred * scale)  # exactly, not nearly
    ramp = jnp.linspace(-5, 5, x.size).reshape(3, 8, 5).transpose(1, 2, 0)
    ordered = np.asarray(module.fake_quant(ramp, params, spec)).transpose(2, 0, 1)
    assert np.all(np.diff(ordered.reshape(3, -1)) >= 0)
    if is_odd(spec):
        assert np.all(codes % 2 == 1)
        return
    np.testing.assert_array_equal(module.fake_quant(jnp.zeros_like(x), params, spec), 0.0)
    if is_live(spec):
        return

    # The first parameters describe x itself; the codes are what ONNX's QuantizeLinear computes.
    np.testing.assert_array_equal(codes, numerics.encode(x, scale, zero_point, form))
    if hasattr(module, "pre_affine"):
        gain, offset = module.pre_affine(params, spec)
        np.testing.assert_array_equal(gain, np.ones(wanted))
        np.testing.assert_array_equal(offset, np.zeros(wanted))

    # A projection onto the grid.
    np.testing.assert_array_equal(module.fake_quant(x_hat, params, spec), x_hat)


@over(1, 4)
def test_gradients_are_finite_and_of_the_primals_type(spec):
    for x in (
        data(spec),
        jnp.zeros(SHAPE),
        jnp.full(SHAPE, 0.7),
        jnp.asarray(np.where(np.arange(120).reshape(SHAPE) == 7, np.inf, data(spec))),
        data(spec, (1, 1, 1)),
        data(spec).astype(jnp.bfloat16),
    ):
        finite = jnp.where(jnp.isfinite(x), x, 0)
        x = finite if is_live(spec) else x  # an infinite weight has no grid
        module, params = fresh(spec, finite)
        x_hat = module.fake_quant(x, params, spec, batch_axes=(0,))
        assert x_hat.dtype == x.dtype and np.isfinite(x_hat).all()
        dx, dparams = gradients(module, spec, x, params, batch_axes=(0,))
        assert dx.shape == x.shape and dx.dtype == x.dtype and np.isfinite(dx).all()
        for name, value in dparams.items():
            assert value.shape == params[name].shape and value.dtype == params[name].dtype
            assert np.isfinite(value).all(), name


@over(4, keep=lambda spec: has_view(spec) and not is_live(spec))
def test_not_a_number_is_kept_and_infinity_saturates(spec):
    _, module, params = start(spec)
    scale, zero_point, form = module.integer_view(params, spec)
    ends = jnp.concatenate(
        [jnp.full((1, 5, 3), v, jnp.float32) for v in (jnp.nan, jnp.inf, -jnp.inf)]
    )
    x_hat = module.fake_quant(ends, params, spec)
    assert np.isnan(x_hat[0]).all()
    np.testing.assert_array_equal(
        x_hat[1], jnp.broadcast_to(((form.qmax - zero_point) * scale), (1, 5, 3))[0]
    )
    np.testing.assert_array_equal(
        x_hat[2], jnp.broadcast_to(((form.qmin - zero_point) * scale), (1, 5, 3))[0]
    )


@over(4, keep=lambda spec: has_view(spec) and not is_live(spec))
def test_special_tensors(spec):
    for value in (0.0, 0.7, -0.3 if spec.signed or not spec.symmetric else 2e-3):
        for shape in (SHAPE, (1, 1, 3), (1, 1, 1)):
            x = jnp.full(shape, value, jnp.float32)
            spec = dataclasses.replace(spec, observer="minmax")
            module, params = fresh(spec, x)
            x_hat = module.fake_quant(x, params, spec)
            # With an observer a constant is an end of its own range.
            scale, _, _ = module.integer_view(params, spec)
            half = scale if is_odd(spec) else scale / 2
            assert np.all(abs(x_hat - x) <= np.maximum(half, 2e-7) * 1.0001)


@over(4)
def test_low_precision_input_is_computed_in_float32(spec):
    x = data(spec).astype(jnp.bfloat16)
    module, params = fresh(spec, x)
    wide = module.fake_quant(x.astype(jnp.float32), params, spec)
    np.testing.assert_array_equal(
        module.fake_quant(x, params, spec).astype(jnp.float32),
        wide.astype(jnp.bfloat16).astype(jnp.float32),
    )
    _, low = gradients(module, spec, x, params)
    _, high = gradients(module, spec, x.astype(jnp.float32), params)
    # The upstream gradient was rounded to bfloat16, 8 bits, before some 120 terms were summed.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05), low, high)


@over(4, keep=lambda spec: spec.signed and spec.granularity == "tensor")
def test_float64_stays_float64(spec):
    x = np.asarray(data(spec), np.float64)
    module, params = fresh(spec, data(spec))
    with jax.enable_x64(True):
        x_hat, (dx, dparams) = jax.jit(
            lambda x, p: (module.fake_quant(x, p, spec), gradients(module, spec, x, p))
        )(x, params)
    assert x_hat.dtype == dx.dtype == jnp.float64
    assert all(dparams[k].dtype == params[k].dtype for k in params)


@over(3)
def test_transformed_and_not_are_the_same(spec):
    x, module, params = start(spec)
    f = functools.partial(module.fake_quant, spec=spec)
    eager = f(x, params)
    same(spec, jax.jit(f)(x, params), eager)
    same(spec, jax.remat(f)(x, params), eager)

    plain = gradients(module, spec, x, params)
    compiled = jax.jit(functools.partial(gradients, module, spec))(x, params)
    again = jax.grad(lambda x, p: jnp.sum(weights(x) * jax.remat(f)(x, p)), (0, 1))(x, params)
    for other in (compiled, again):
        # A wrong mask would differ by whole gradients; surrogates' tanh differs in its last bits.
        np.testing.assert_allclose(other[0], plain[0], rtol=2e-6, atol=1e-7)
        # Sums of 120 terms in another order.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other[1], plain[1]
        )


@over(4, keep=lambda spec: spec.signed)
def test_vmap_over_examples_and_over_parameters(spec):
    x, module, params = start(spec)
    if spec.granularity == "channel":
        # Inside vmap an example has two axes, and so have the parameters.
        params = {k: np.asarray(v)[0] for k, v in params.items()}
    x = np.asarray(x)
    one = jax.jit(lambda x, p: (module.fake_quant(x, p, spec), gradients(module, spec, x, p)))
    equal = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    values, slopes = jax.jit(jax.vmap(one, (0, None)))(x, params)
    for i in range(0, len(x), 3):
        value, slope = one(x[i], params)
        np.testing.assert_array_equal(values[i], value)
        jax.tree.map(lambda a, b, i=i: equal(a[i], b), slopes, slope)

    many = {
        k: np.stack([np.asarray(v) * np.float32(1 + i / 8) for i in range(len(x))])
        for k, v in params.items()
    }
    values, slopes = jax.jit(jax.vmap(one))(x, many)
    for i in range(0, len(x), 3):
        value, slope = one(x[i], {k: v[i] for k, v in many.items()})
        np.testing.assert_array_equal(values[i], value)
        jax.tree.map(lambda a, b, i=i: equal(a[i], b), slopes, slope)


@over(4, keep=lambda spec: spec.granularity == "channel")
def test_a_channel_is_a_tensor_of_its_own(spec):
    x = data(spec) * jnp.array([[[0.1, 1.0, 7.0]]])
    module, params = fresh(spec, x)
    x_hat = module.fake_quant(x, params, spec, batch_axes=(0,))
    dx, dparams = gradients(module, spec, x, params, batch_axes=(0,))
    alone = Spec(spec.bits, quantizer=spec.quantizer, signed=spec.signed, symmetric=spec.symmetric)
    for c in range(3):
        part = x[..., c]
        _, p = fresh(alone, part)
        for name in p:
            np.testing.assert_allclose(p[name], params[name][0, 0, c], rtol=1e-6)
        p = {k: v[0, 0, c] for k, v in params.items()}
        f = lambda x, p: module.fake_quant(x, p, alone, batch_axes=(0,))
        out, pull = jax.vjp(f, part, p)
        same(spec, out, x_hat[..., c])
        dpart, dp = pull(weights(x)[..., c])
        # Surrogates' functions differ in their last bits with the shape.
        np.testing.assert_allclose(dpart, dx[..., c], rtol=2e-6, atol=1e-7)
        for name in dp:
            np.testing.assert_allclose(dp[name], dparams[name][0, 0, c], rtol=1e-4, atol=1e-5)


@over(4)
def test_a_mean_over_examples_does_not_depend_on_the_batch_size(spec):
    x, module, params = start(spec)

    def mean_gradient(x):
        loss = lambda p: jnp.mean(
            jnp.sum(module.fake_quant(x, p, spec, batch_axes=(0,)) ** 3, axis=(1, 2))
        )
        return jax.grad(loss)(params)

    once, thrice = mean_gradient(x), mean_gradient(jnp.concatenate([x, x, x]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), once, thrice)


@over(4)
def test_the_backward_pass_keeps_the_input_and_the_parameters_only(spec):
    x, module, params = start(spec)
    _, pull = jax.vjp(lambda x, p: module.fake_quant(x, p, spec), x, params)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size == x.size]
    assert len(kept) <= 1
    for leaf in kept:
        np.testing.assert_array_equal(leaf, x)


@over(4, keep=lambda spec: spec.signed and not is_live(spec))
@pytest.mark.parametrize("runner", ["pmap", "shard_map"])
def test_four_devices_equal_one(spec, runner):
    x, module, params = start(spec)
    total = lambda x, p: jnp.sum(module.fake_quant(x, p, spec, batch_axes=(0,)) ** 3)
    grad = jax.value_and_grad(total, (0, 1))
    one, (dx, dparams) = grad(x, params)

    def reduced(x, p):
        value, (dx, dp) = grad(x, p)
        if runner == "pmap":
            dp = jax.lax.psum(dp, "batch")
        # Where `shard_map` tracks what varies, gradients of replicated parameters come out summed.
        return jax.lax.psum(value, "batch"), (dx, dp)

    if runner == "pmap":
        out = jax.pmap(reduced, axis_name="batch", in_axes=(0, None))(x.reshape(4, 2, 5, 3), params)
        value, (dx4, dp4) = (
            out[0][0],
            (out[1][0].reshape(x.shape), jax.tree.map(lambda a: a[0], out[1][1])),
        )
    else:
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        mapped = jax.shard_map(
            reduced,
            mesh=mesh,
            in_specs=(P("batch"), P()),
            out_specs=(P(), (P("batch"), P())),
        )
        value, (dx4, dp4) = jax.jit(mapped)(x, params)
    np.testing.assert_allclose(value, one, rtol=1e-5)
    np.testing.assert_allclose(dx4, dx, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), dp4, dparams)


@over(2)
def test_parameters_that_do_not_fit_are_refused(spec):
    x, module, params = start(spec)
    with pytest.raises(ValueError, match=r"params has the keys \['other'\]"):
        module.fake_quant(x, {"other": jnp.ones(())}, spec)
    with pytest.raises(ValueError, match=r"params\['.*'\] has shape \(3,\)"):
        module.fake_quant(x, {k: jnp.ones((3,)) for k in params}, spec)


@over(4, keep=lambda spec: spec.symmetric and not spec.signed)
def test_negative_data_under_an_unsigned_symmetric_spec_are_refused(spec):
    stats = numerics.finish(numerics.measure(jnp.array([-0.2, 1.0])))
    with pytest.raises(ValueError, match=r"reach down to -0.2.*signed=True"):
        QUANTIZERS[spec.quantizer].init(stats, spec)


@over(4, keep=lambda spec: spec.granularity == "channel")
def test_a_grid_of_no_size_is_refused(spec):
    """All sizes are above 0 at the start; what training learns of them is refused below."""
    _, params = fresh(spec, data(spec))
    quantizers.check_sizes("input", params, spec)
    sizes = quantizers.grid_sizes(params, spec)
    assert all(np.all(size > 0) for size in sizes.values())
    stated = quantizers.facts(spec.quantizer)
    learned = [n for n in stated.size if not stated.size_option or spec.option("static", False)]
    if not learned:
        return
    gone = {
        n: jnp.full_like(p, -jnp.inf if n.startswith("log2_") else 0) for n, p in params.items()
    }
    with pytest.raises(ValueError, match=r"of the input holds .*greater than 0.*Training"):
        quantizers.check_sizes("input", {**params, **{n: gone[n] for n in learned}}, spec)


@over(4)
def test_traces_once_for_one_spec(spec):
    x, module, params = start(spec)
    traces = []

    @jax.jit
    def f(x, p):
        traces.append(1)
        return module.fake_quant(x, p, spec)

    f(x, params)
    f(x + 1, jax.tree.map(lambda v: v * 2, params))
    assert len(traces) == 1


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_a_quantizer_states_of_itself_is_true(name):
    stated = quantizers.facts(name)
    assert stated.size_option in ("", *stated.options)
    assert 1 <= stated.min_bits <= 2
    given = dict.fromkeys([stated.size_option], True) if stated.size_option else {}
    for spec in taken(name, range(1, 17)):
        spec = dataclasses.replace(spec, options=given)
        module, params = fresh(spec, data(spec))
        assert {*stated.size, stated.annealed, stated.step} - {""} <= {*params}
        grid = module.integer_view(params, spec)
        if stated.step:
            np.testing.assert_array_equal(grid.scale, params[stated.step])
        if stated.narrow:
            assert grid.format == quantizers.code_format(spec)
        if stated.range_grid:
            stats = numerics.finish(numerics.measure(data(spec), channel_axes=channels(spec)))
            wanted = numerics.range_parameters(stats.lo, stats.hi, spec)
            jax.tree.map(np.testing.assert_array_equal, grid[:2], wanted)
    # A quantizer of unsigned tensors alone must not get inputs of both signs from a preset.
    assert any(spec.signed for spec in taken(name, range(1, 17))) or not stated.signed_inputs
    for preset in (stated.preset, stated.preset_8_bits):
        assert {*preset} <= {"weight", "input"}
        for fields in preset.values():
            Spec(**{"bits": 8, **fields})


def test_unknown_quantizer():
    with pytest.raises(ValueError, match=r"unknown quantizer 'lqs'.*Did you mean 'lsq'"):
        quantizers.check(Spec(4, quantizer="lqs"))
