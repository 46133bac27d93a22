"""The graph: labels, inlining, unrolling, constants, dead code, and any batch size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax import graph


def ops(traced):
    return [node.op for node in traced.nodes]


def named(name, function):
    def call(*args):
        return function(*args)

    call.__name__ = name
    return jax.jit(call)


@pytest.fixture(scope="module")
def mixed():
    model, images = small_nets.Mixed(), small_nets.images()
    variables = small_nets.trained_like(jax.eval_shape(model.init, jax.random.key(0), images))
    return model, variables, images


def test_leaves_carry_their_path_and_nodes_their_module(mixed):
    model, variables, images = mixed
    traced = graph.trace(model.apply, variables, images)
    convs = [n for n in traced.nodes if n.op == "conv_general_dilated"]
    assert [n.scope for n in convs] == ["stem", "depthwise", "grouped", "dilated"]
    assert [traced.leaves[n.inputs[1]] for n in convs] == [
        f"params/{n.scope}/kernel" for n in convs
    ]


def test_batch_norm_is_subtract_multiply_add_by_constants(mixed):
    model, variables, images = mixed
    traced = graph.trace(model.apply, variables, images)
    inside = [n for n in traced.nodes if n.scope == "stem_bn"]
    assert [n.op for n in inside] == ["sub", "mul", "add"]
    gain = traced.constants[inside[1].inputs[1]]
    var = variables["batch_stats"]["stem_bn"]["var"]
    expected = variables["params"]["stem_bn"]["scale"] / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(gain.reshape(-1), expected, rtol=1e-6)
    assert traced.sources[inside[1].inputs[1]] == {
        "params/stem_bn/scale",
        "batch_stats/stem_bn/var",
    }


def test_runs_like_the_model_at_the_traced_and_at_other_batch_sizes(mixed):
    model, variables, images = mixed
    traced = graph.trace(model.apply, variables, images, any_batch=True)
    for batch in (1, 6):
        x = small_nets.images(batch, seed=batch)
        np.testing.assert_allclose(traced.run(x), model.apply(variables, x), rtol=1e-5, atol=1e-6)


def test_calls_are_inlined_and_scans_unrolled():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(4, name="dense")(x)), x

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                nn.remat(Body), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, seen = scan(name="layers")(x, None)
            return jax.nn.softmax(x) + seen.sum(0)

    x = jax.random.normal(jax.random.key(1), (5, 4))
    model = Net()
    variables = model.init(jax.random.key(0), x)
    traced = graph.trace(model.apply, variables, x, any_batch=True)
    assert ops(traced).count("dot_general") == 3
    assert not graph.INLINED.intersection(ops(traced)) and "scan" not in ops(traced)
    np.testing.assert_allclose(traced.run(x[:2]), model.apply(variables, x[:2]), rtol=1e-6)


def test_reversed_scan_keeps_the_order_of_its_results():
    def fn(variables, x):
        carry, ys = jax.lax.scan(lambda c, w: (c + w, c * w), x, variables["w"], reverse=True)
        return carry, ys

    variables, x = {"w": jnp.arange(6.0).reshape(3, 2)}, jnp.ones((2,))
    traced = graph.trace(fn, variables, x)
    for got, wanted in zip(traced.run(x), fn(variables, x), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_markers_stay_one_node_even_on_constants():
    def fn(variables, x):
        w = named("quantizer:a/b:weight", lambda w, s: jnp.round(w / s) * s)(
            variables["params"]["w"], variables["quant"]["s"]
        )
        x = named("skipped:a/b:input", jax.lax.optimization_barrier)(x)
        return x @ w

    variables = {"params": {"w": jnp.array([[0.4], [1.6]])}, "quant": {"s": jnp.float32(1)}}
    x = jnp.ones((3, 2))
    traced = graph.trace(fn, variables, x, any_batch=True)
    assert ops(traced) == ["quantizer", "skipped", "dot_general"]
    weight = traced.nodes[0]
    assert (weight.params["path"], weight.params["operand"]) == ("a/b", "weight")
    assert [traced.leaves[v] for v in weight.inputs] == ["params/w", "quant/s"]
    np.testing.assert_array_equal(traced.constants[weight.outputs[0]], [[0], [2]])
    np.testing.assert_array_equal(traced.run(x), fn(variables, x))


def test_dead_code_and_unused_leaves_are_dropped():
    def fn(variables, x):
        _ = jnp.exp(x) @ variables["unused"]
        return x + variables["used"]

    variables = {"used": jnp.ones(()), "unused": jnp.ones((3, 3))}
    traced = graph.trace(fn, variables, jnp.ones((2, 3)))
    assert ops(traced) == ["add"]
    assert list(traced.leaves.values()) == ["used"]


def test_shapes_alone_are_enough_but_give_no_constants(mixed):
    model, variables, images = mixed
    shapes = jax.eval_shape(lambda: variables)
    traced = graph.trace(model.apply, shapes, jax.ShapeDtypeStruct(images.shape, images.dtype))
    assert ops(traced).count("conv_general_dilated") == 4
    assert not set(traced.leaves) & set(traced.constants)
    node = next(n for n in traced.nodes if n.op == "conv_general_dilated")
    assert traced.shape(node.outputs[0]) == (6, 5, 6, 8)
    assert traced.dtype(node.outputs[0]) == np.float32


def test_producers_and_readers(mixed):
    model, variables, images = mixed
    traced = graph.trace(model.apply, variables, images)
    stem = next(n for n in traced.nodes if n.scope == "stem")
    bias = traced.sole_consumer(stem.outputs[0])
    assert bias is not None and bias.op == "add"
    assert traced.producer(stem.outputs[0]) is stem
    assert traced.producer(traced.inputs[0]) is None
    (result,) = traced.outputs
    assert traced.sole_consumer(result) is None


def test_a_batch_size_inside_the_numbers_is_refused():
    with pytest.raises(ValueError, match="depends on the batch size"):
        graph.trace(lambda v, x: x.mean(0) + v, jnp.ones(()), jnp.ones((4, 2)), any_batch=True)
    with pytest.raises(ValueError, match="scan over the batch"):
        graph.trace(
            lambda v, x: jax.lax.scan(lambda c, row: (c + row, row), v, x)[0],
            jnp.ones((2,)),
            jnp.ones((4, 2)),
            any_batch=True,
        )
    with pytest.raises(ValueError, match="one batch axis"):
        graph.trace(lambda v, x: x + v, jnp.ones(()), jnp.ones(()), any_batch=True)


def test_a_number_that_is_derived_from_the_batch_size_is_refused():
    def mean(variables, x):
        return x * variables["w"] * (1.0 / x.shape[0])

    with pytest.raises(ValueError, match="depends on the batch size"):
        graph.trace(mean, {"w": jnp.ones(())}, jnp.ones((4, 3)), any_batch=True)


def test_constants_have_the_bits_of_the_compiled_function():
    """A mean over 27 elements divides by a number, which compilers multiply by its reciprocal."""

    def standardized(variables, x):
        kernel = variables["params"]["kernel"]
        centred = kernel - kernel.mean((0, 1, 2), keepdims=True)
        variance = jnp.square(centred).mean((0, 1, 2), keepdims=True)
        return x + centred / jnp.sqrt(variance * 27 + 1e-4), kernel * 3

    kernel = jax.random.normal(jax.random.key(0), (3, 3, 3, 512))
    variables = {"params": {"kernel": kernel}}
    traced = graph.trace(standardized, variables, jnp.zeros(kernel.shape))
    (add,) = (node for node in traced.nodes if node.op == "add")
    compiled, thrice = jax.jit(standardized)(variables, jnp.zeros(kernel.shape))
    found = traced.constants[next(v for v in add.inputs if v in traced.constants)]
    np.testing.assert_array_equal(found, compiled)
    one_by_one, _ = standardized(variables, jnp.zeros(kernel.shape))
    assert np.any(np.asarray(one_by_one) != np.asarray(compiled))  # else this shows nothing
    np.testing.assert_array_equal(traced.constants[traced.outputs[1]], thrice)


def test_a_reshape_that_reorders_axes_first_is_evaluated_so():
    # As jax.vmap writes the kernels of a convolution's members side by side.
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    read = lambda v, x: x + jax.lax.reshape(v["table"], (6,), (1, 0))
    traced = graph.trace(read, {"table": table}, np.zeros(6, np.float32))
    np.testing.assert_array_equal(traced.run(np.zeros(6, np.float32)), [0, 3, 1, 4, 2, 5])


def test_an_inner_axis_as_long_as_the_traced_batch_is_no_batch():
    """1009 and 2003 are sizes that graphs are traced with; the batch is what differs."""

    def fn(variables, x):
        y = jnp.repeat(x, 1009, 1) * jnp.arange(1009.0)[None] + jnp.zeros((1, 2003))[:, :1]
        return y.sum(1) + variables, y[:, :1009].reshape(x.shape[0], -1)

    x = jnp.arange(1.0, 4.0)[:, None]
    traced = graph.trace(fn, jnp.ones(()), x[:2], any_batch=True)
    total, flat = traced.run(x)
    np.testing.assert_allclose(total, np.arange(1, 4) * (1008 * 1009 / 2) + 1, rtol=1e-6)
    assert flat.shape == (3, 1009)


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (lambda v, x: jnp.concatenate([jnp.ones((1, 2)) * v, x])[1:], "concatenate"),
        (lambda v, x: v * jnp.roll(x, 1, 0), "slice"),
        (lambda v, x: v * x[:-1], "slice"),
    ],
    ids=["joined", "rolled", "cut"],
)
def test_a_batch_that_is_cut_or_joined_is_refused_and_traced_as_it_is(fn, op):
    x = jnp.arange(6.0).reshape(3, 2)
    with pytest.raises(ValueError, match=rf"'{op}' in .*batch size [+-]1.*any_batch=False"):
        graph.trace(fn, jnp.ones(()), x, any_batch=True)
    np.testing.assert_array_equal(graph.trace(fn, jnp.ones(()), x).run(x), fn(1.0, x))


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(
    "fn",
    [
        lambda v, x: v * x if x.shape[0] > 8 else x,
        lambda v, x: v * x + x.shape[0] % 8,
        lambda v, x: v * x * np.arange(8.0, dtype=np.float32)[x.shape[0] % 8],
        lambda v, x: v * x + x[: min(4, x.shape[0])].mean(0, keepdims=True),
        lambda v, x: v * x[np.random.RandomState(0).permutation(x.shape[0])],
        lambda v, x: v * x * np.random.RandomState(0).randn(x.shape[0], 1).astype(np.float32),
        lambda v, x: v * x - (x if x.shape[0] > 8 else v),
        lambda v, x: jax.jit(lambda x: x + min(x.shape[0], 17))(v * x),
        lambda v, x: jax.lax.fori_loop(0, min(x.shape[0], 17), lambda i, x: x * v, x),
    ],
    ids=["branch", "sum", "constant", "cut", "order", "noise", "operand", "call", "loop"],
)
def test_python_that_reads_the_batch_size_is_refused_and_traced_as_it_is(fn, rows):
    """A graph is one program; at the example's size and at two examples it is the function's."""
    x = np.arange(2.0 * rows, dtype=np.float32).reshape(rows, 2)
    with pytest.raises(ValueError, match=r"batch size.*any_batch=False"):
        graph.trace(fn, jnp.float32(3), x, any_batch=True)
    np.testing.assert_array_equal(graph.trace(fn, jnp.float32(3), x).run(x), fn(3, x))


def test_a_batch_of_one_that_is_no_axis_is_refused():
    squeezed = lambda v, x: v * jnp.squeeze(x)
    with pytest.raises(
        ValueError, match=r"with 1 examples .* results of another shape.*any_batch=False"
    ):
        graph.trace(squeezed, jnp.ones(()), jnp.ones((1, 3)), any_batch=True)
    assert graph.trace(squeezed, jnp.ones(()), jnp.ones((2, 3)), any_batch=True).batch


@pytest.mark.parametrize("mode", ["edge", "linear_ramp", "reflect", "symmetric", "wrap", "mean"])
def test_padding_that_spares_the_batch_runs_at_any_batch_size(mode):
    fn = lambda v, x: v * jnp.pad(x, ((0, 0), (1, 2), (0, 0)), mode=mode)
    x = np.arange(30, dtype=np.float32).reshape(5, 3, 2)
    traced = graph.trace(fn, jnp.ones(()), x[:2], any_batch=True)
    expected = np.pad(x, ((0, 0), (1, 2), (0, 0)), mode=mode)
    np.testing.assert_allclose(traced.run(x), expected, rtol=1e-6)


def test_indices_and_constants_of_the_batch_size_run_at_any_batch_size():
    ones = np.ones

    def fn(variables, x):
        own = x[jnp.arange(x.shape[0]), x.argmax(-1)]  # counts from the end: the batch in a number
        return own[:, None] * ones((x.shape[0], 1), np.float32) + variables

    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    traced = graph.trace(fn, jnp.ones(()), x[:2], any_batch=True)
    np.testing.assert_array_equal(traced.run(x), x.max(-1, keepdims=True) + 1)


def test_every_branch_is_written_out_and_one_selected():
    def fn(variables, x):
        y = jax.lax.cond(x.sum() > 0, lambda x: 2 * x, lambda x: x - variables, x)
        index = jnp.int32(x[0, 0])
        z = jax.lax.switch(index, [lambda x: x, lambda x: -x, lambda x: x + 10], x)
        return y, z, jax.lax.cond(True, lambda x: x + 1, jnp.exp, x)

    x = jnp.array([[1.0, 2.0], [0.5, 1.0]])
    traced = graph.trace(fn, jnp.ones(()), x, any_batch=True)
    assert "cond" not in ops(traced)
    assert "exp" not in ops(traced)
    for rows, first, second in (
        (x[:1], 2 * x[:1], -x[:1]),
        (-x, -x - 1, -x),
        (4 * x, 8 * x, 4 * x + 10),
    ):
        y, z, w = traced.run(rows)
        np.testing.assert_array_equal(y, first)
        np.testing.assert_array_equal(z, second)
        np.testing.assert_array_equal(w, rows + 1)


def test_repeats_and_stacks_are_broadcasts_and_joins():
    def fn(variables, x):
        whole = jnp.tile(variables, (x.shape[0], 1, 2)) + jnp.tile(x, (1, 2, 1))
        return jnp.stack([whole, whole + 1], 1)

    x = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    v = np.arange(8, dtype=np.float32).reshape(1, 4, 2)
    traced = graph.trace(fn, v, x[:2], any_batch=True)
    assert not {"tile", "stack"} & set(ops(traced))
    whole = np.tile(v, (3, 1, 2)) + np.tile(x, (1, 2, 1))
    np.testing.assert_array_equal(traced.run(x), np.stack([whole, whole + 1], 1))


def test_a_loop_of_unknown_length_runs_at_any_batch_size():
    def fn(variables, x):
        more = lambda c: c[0] < variables
        return jax.lax.while_loop(
            more, lambda c: (c[0] + 1, c[1] * jnp.ones_like(c[1]) * 2), (0, x)
        )

    traced = graph.trace(fn, jnp.int32(3), jnp.ones((2, 3)), any_batch=True)
    assert "while" in ops(traced)
    np.testing.assert_array_equal(traced.run(jnp.ones((5, 3)))[1], np.full((5, 3), 8))


@jax.jit
def beside(x):
    """Stands beside every layer, as the statistics of `calibrate` do."""
    return jnp.max(x), jnp.sum(x, axis=0)


def deep(scales, *, table=None):
    """A function of one layer a scale, with a call of every kind between the cuts."""

    @jax.checkpoint
    def layer(w, x):
        seen = beside(x)
        return seen, jax.nn.relu(jax.nn.softmax(x @ w) + x)

    def function(w, x):
        found = []
        for scale in scales:
            seen, x = layer(w, x)
            found.append(seen)
            step = lambda x, w, scale=scale: (jnp.sin(x * scale + w), w[0])
            x = jax.lax.scan(step, x, w[:, None])[0]
        return found, w, 7, x if table is None else x + table

    return function


def cut(function, *args):
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    segments = graph.Segments(closed, "beside")
    return segments, lambda *args: jax.tree.unflatten(
        jax.tree.structure(shapes), segments(*jax.tree.leaves(args))
    )


def test_segments_run_like_the_whole():
    w, x = (
        jax.random.normal(jax.random.key(0), (5, 5)),
        jax.random.normal(jax.random.key(1), (4, 5)),
    )
    function = deep([1.5, 1.5, 0.5], table=np.arange(5, dtype=np.float32)[None])
    _, run = cut(function, w, x)
    for given in (x, -x):
        # The same operations on the same numbers; sines are compiled with other neighbours.
        compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        jax.tree.map(compare, run(w, given), jax.jit(function)(w, given))


def test_equal_segments_are_one_program_and_others_are_not():
    args = jnp.ones((5, 5)), jnp.ones((4, 5))
    count = lambda fn: cut(fn, *args)[0].programs

    def plain(n):
        def net(w, x):
            found = []
            for _ in range(n):
                found.append(beside(x))
                x = jax.nn.relu(x @ w * 2)
            return found

        return net

    # The statistics, and a product with its activation.
    assert count(plain(4)) == count(plain(12)) == 2

    def signs(w, x):
        found = []
        for zero in (0.0, -0.0, 0.0):
            found.append(beside(x))
            x = x * zero
        return found, beside(x), x

    segments, run = cut(signs, *args)
    assert segments.programs == 3  # the statistics, and a product with each zero
    zeros = jax.tree.leaves(run(*args)[2])[0]
    assert np.signbit(zeros).all()


def test_segments_hold_no_array_that_is_read_no_more_and_compute_none_that_nobody_reads():
    live, ran = [], []
    shape = (3, 41)  # no other array has it

    def function(n):
        def net(x):
            found = []
            for _ in range(n):
                found.append(beside(x)[0])
                x = jnp.sin(x)
                jax.debug.callback(
                    lambda: live.append(sum(a.shape == shape for a in jax.live_arrays()))
                )
            jax.pure_callback(lambda x: ran.append(1) or x, x, x)
            return found

        return net

    most = []
    for n in (4, 12):
        x = jnp.ones(shape)
        _, run = cut(function(n), x)
        live.clear()
        jax.block_until_ready(run(x))
        jax.effects_barrier()
        assert len(live) == n
        most.append(max(live))
    assert most[1] <= 6 and not ran  # the input, and what the segments at hand read and write
