"""One device, four by jit, four by pmap: the same step; lowering for accelerators; the cache."""

import os

import jax
import jax.export
import numpy as np
import pytest
import tiny_nets

from qkd_jax.models import create
from qkd_jax.quantize import quantize
from qkd_jax.record.progress import Progress
from qkd_jax.training import (
    compile_step,
    enable_compilation_cache,
    frozen_variables,
    make_step,
    plan_step,
    start_state,
)
from qkd_jax.training.loop import Hooks, run_steps

STATES = 20
# Arrays that start at zero (norms' biases) are all rounding noise after one step; three steps on,
# they have a size to compare with.
WARM = 3


@pytest.fixture(scope="module")
def plan():
    return tiny_nets.co_study_plan()


@pytest.fixture(scope="module")
def alone(plan):
    return compile_step(make_step(plan.structure), devices=jax.devices()[:1])


def run(compiled, state, steps, cast=lambda tree: tree):
    """[(state before, state after, metrics)] along a run, on the host."""
    rows = []
    for index in range(steps):
        before = jax.device_get(state)
        state, metrics = compiled(state, cast(tiny_nets.batch(index)), {})
        rows.append((before, jax.device_get(state), jax.device_get(metrics)))
    return rows


@pytest.fixture(scope="module")
def stored(plan, alone):
    return run(alone, start_state(plan, tiny_nets.conv_nets()[1]), WARM + STATES)


def close(got, want, tolerance, what, least=0.0):
    """Every array within `tolerance` of its largest entry: sums are taken in another order."""

    def check(path, a, b):
        assert np.shape(a) == np.shape(b)
        scale = np.maximum(tolerance * np.max(np.abs(b)), least)
        message = f"{what}, {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=scale, err_msg=message)

    jax.tree_util.tree_map_with_path(check, got, want)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_four_devices_equal_one(plan, stored, mode):
    shared = compile_step(make_step(plan.structure), mode=mode, devices=jax.devices()[:4])
    for index, (before, want, want_metrics) in enumerate(stored[WARM:]):
        new, metrics = shared(before, tiny_nets.batch(WARM + index), {})
        # The nets hold parameters, BatchNorm's statistics and the quantizers' steps.
        close(jax.device_get(new.nets), want.nets, 1e-5, f"state {index}")
        # A divergence is a small difference of terms of order T^2: 4e-7 an example in float32.
        least = 4e-7 * len(tiny_nets.batch()["label"])
        close(jax.device_get(metrics), want_metrics, 2e-5, f"metrics {index}", least)
        assert new.step == want.step
    assert shared.traces == 1
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_steps_that_nobody_waits_for(mode):
    """Some hundred small steps in flight together would wait for one another's threads."""
    images = {"image": np.ones((8, 2, 2, 1), np.float32), "label": np.arange(8) % 3}
    net = quantize(create("mlp", 3, hidden=()))
    plan = plan_step({"net": net}, {"net": {"ce": {}}}, {"net": {"lr": 0.1}}, horizon=400)
    state = start_state(plan, {"net": net.init(jax.random.key(0), images["image"])})
    step = compile_step(make_step(plan.structure), mode=mode, devices=jax.devices()[:4])
    batch = step.shard_batch(images)
    for _ in range(400):
        state, _ = step(state, batch, {})
    assert state.step == 400


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_a_run_on_four_devices_equals_one_in_float64(plan, mode):
    def cast(tree):
        return jax.tree.map(lambda x: np.float64(x) if x.dtype == np.float32 else x, tree)

    variables = cast(jax.device_get(tiny_nets.conv_nets()[1]))
    with jax.enable_x64(True):
        ends = []
        for how, count in (("jit", 1), (mode, 4)):
            compiled = compile_step(
                make_step(plan.structure), mode=how, devices=jax.devices()[:count]
            )
            ends.append(run(compiled, start_state(plan, variables), STATES, cast)[-1])
    # Whole runs, apart from their first step on: no device has its own statistics or gradients.
    (_, want, want_metrics), (_, got, metrics) = ends
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(got.nets))
    close(got.nets, want.nets, 1e-10, "after a run")
    close(metrics, want_metrics, 1e-6, "metrics")


def test_a_stage_traces_its_step_once(alone, stored):
    assert len(stored) == WARM + STATES and alone.traces == 1


def test_pmap_is_jit_of_an_untracked_shard_map():
    """What parallel.py says of it; an array that it calls replicated may differ by device."""
    mapped = jax.pmap(
        lambda x: (jax.lax.psum(x.sum(), "batch"), x.mean()), axis_name="batch", out_axes=None
    )
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    (outer,) = jax.make_jaxpr(mapped)(x).eqns
    (inner,) = outer.params["jaxpr"].eqns
    assert (outer.primitive.name, inner.primitive.name) == ("jit", "shard_map")
    assert inner.params["check_vma"] is False
    total, mean = mapped(x)
    assert total == 28 and total.sharding.is_fully_replicated and mean.sharding.is_fully_replicated
    assert [float(shard.data) for shard in mean.addressable_shards] == [0.5, 2.5, 4.5, 6.5]


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_state_is_donated_and_frozen_is_not(mode):
    modules, variables = tiny_nets.mlps()
    plan = plan_step(modules, {"a": {"kd": {"source": "b"}}}, {"a": {"lr": 0.1}}, horizon=9)
    compiled = compile_step(make_step(plan.structure), mode=mode, devices=jax.devices()[:2])
    frozen = compiled.place(frozen_variables(plan, variables))
    state = compiled.place(start_state(plan, variables))
    batch = compiled.shard_batch(tiny_nets.batch())
    new, _ = compiled(state, batch, frozen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.nets))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, frozen, batch)))
    # The caller's own variables live on.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(variables))
    rows = 8 if mode == "jit" else 1  # under pmap a device's rows are the second axis
    assert batch["image"].sharding.shard_shape(batch["image"].shape)[0] == rows


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_masked_rows_may_lie_on_one_device(mode):
    modules, variables = tiny_nets.mlps()
    plan = plan_step(modules, {"a": {"ce": {}}}, {"a": {"lr": 1.0, "momentum": 0.0}}, horizon=9)
    batch = {**tiny_nets.batch(rows=8), "mask": np.arange(8) < 5}
    results = []
    for devices in (jax.devices()[:1], jax.devices()[:4]):
        compiled = compile_step(make_step(plan.structure), mode=mode, devices=devices)
        state, metrics = compiled(start_state(plan, variables), batch, {})
        results.append(jax.device_get((state.nets, metrics)))
    assert results[0][1]["net0"]["count"] == 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


@pytest.mark.parametrize(("mode", "count"), [("jit", 1), ("jit", 4), ("pmap", 4)])
def test_a_batch_goes_to_the_devices_once_a_step(plan, monkeypatch, mode, count):
    devices, steps = jax.devices()[:count], 3
    compiled = compile_step(make_step(plan.structure), mode=mode, devices=devices)
    batches = [{**tiny_nets.batch(i), "index": np.arange(16)} for i in range(steps)]
    state = start_state(plan, tiny_nets.conv_nets()[1])
    for batch in batches:
        early = compiled.shard_batch(batch)
        assert compiled.shard_batch(early)["image"] is early["image"]
        state, _ = compiled(state, early, {})

    put, function, sent = jax.device_put, compiled.function, []

    def counted(tree, *arguments, **options):
        if isinstance(tree, dict) and "image" in tree:
            sent.append(sorted(tree))
        return put(tree, *arguments, **options)

    def in_place(state, batch, frozen):
        # All is where the program wants it, so JAX moves nothing by itself.
        for array in jax.tree.leaves(batch):
            assert array.sharding.device_set == set(devices)
            assert array.addressable_shards[0].data.size * count == array.size
        return function(state, batch, frozen)

    monkeypatch.setattr(jax, "device_put", counted)
    monkeypatch.setattr(compiled, "function", in_place)
    quiet = Hooks(
        log=lambda step, values: None,
        look=lambda step, state: None,
        look_at=lambda step: False,
        save=lambda step, state, window: None,
        save_at=lambda step: False,
        stop=lambda: False,
    )
    looped = run_steps(
        compiled,
        plan,
        start_state(plan, tiny_nets.conv_nets()[1]),
        {},
        iter(batches),
        quiet,
        Progress("stage", steps, 16, enabled=False),
        done=0,
        steps=steps,
    )
    assert sent == [["image", "index", "label"]] * steps
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state, looped)))


def test_batch_must_be_divisible(plan):
    compiled = compile_step(make_step(plan.structure), devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="15 examples, which 4 devices cannot share"):
        compiled.shard_batch(tiny_nets.batch(rows=15))


def test_unknown_mode(plan):
    with pytest.raises(ValueError, match="Did you mean 'pmap'"):
        compile_step(make_step(plan.structure), mode="pmapp")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_step_lowers_for_accelerators(plan, platform):
    _, variables = tiny_nets.conv_nets()
    compiled = compile_step(make_step(plan.structure), devices=jax.devices()[:4])
    exported = jax.export.export(compiled.function, platforms=[platform])(
        start_state(plan, variables), tiny_nets.batch(), {}
    )
    assert exported.platforms == (platform,) and exported.nr_devices == 4
    assert "stablehlo.convolution" in exported.mlir_module()


CACHE_OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def cache_options():
    before = {name: getattr(jax.config, name) for name in CACHE_OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_cache_directory(cache_options, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = enable_compilation_cache()
    assert default is not None and default.startswith(str(tmp_path / "qkd_jax" / "xla"))
    assert jax.config.jax_compilation_cache_dir == default
    mine = enable_compilation_cache(tmp_path / "mine")
    # One folder for each kind of processor below the one that was asked for.
    assert [str(path) for path in (tmp_path / "mine").iterdir()] == [mine]
    assert mine is not None and os.listdir(mine) == []


def test_unwritable_cache_directory_is_a_warning(cache_options, tmp_path):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    with pytest.warns(UserWarning, match="cannot be written"):
        assert enable_compilation_cache(tmp_path / "file" / "cache") is None
    assert jax.config.jax_compilation_cache_dir == before
