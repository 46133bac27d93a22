"""Learning one unit of a net: the rounding of its weights and the steps of its activations."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qkd_jax import numerics
from qkd_jax.graph import Node, execute
from qkd_jax.numerics import Grid
from qkd_jax.ptq.soft_rounding import beta_at, hard_weight, penalty, soft_weight, start
from qkd_jax.ptq.units import Unit, run_unit
from qkd_jax.quantize.traced import TracedNet, grid_of, quantizer_params
from qkd_jax.quantizers import QUANTIZERS, facts

Report = Callable[[str, int, float], None]
"""Called with (unit's layers, steps done, reconstruction error)."""
Data = tuple[jax.Array, jax.Array, jax.Array]
"""(entry in the quantized net, entry in the float net, exit in the float net)."""
Params = dict[str, Any]
"""{"v": V of each weight, "steps": {index of a learned quantizer: its step}}."""

CHUNK = 100  # steps of one compiled call: how often there is progress to report


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings for learning a unit; the fields are arguments of `reconstruct.qdrop`."""

    steps: int
    batch_size: int
    lr: float
    weight: float
    step_lr: float = 0.0
    drop: float = 0.0


class UnitLearner:
    """Learns V of each weight of a unit, and the steps of its activations."""

    def __init__(self, traced: TracedNet, unit: Unit, settings: Settings, report: Report):
        self.traced, self.unit, self.settings, self.report = traced, unit, settings, report
        constants = traced.graph.constants
        self.kernels = [jnp.asarray(constants[n.inputs[0]], jnp.float32) for n in unit.weights]
        grids = [grid_of(traced, node) for node in unit.weights]
        self.grids = [
            Grid(jnp.asarray(scale), jnp.asarray(zero_point), format)
            for scale, zero_point, format in grids
        ]
        self.learned = [
            node
            for node in unit.inputs
            if settings.step_lr > 0
            and facts(traced.spec(node).quantizer).step
            and not traced.spec(node).dynamic
            # A step that is learned would leave its format.
            and numerics.scale_format(traced.spec(node)) == "float32"
        ]
        # (step, zero point or None), known before anything is traced.
        self.starts = [self._parameters(node) for node in self.learned]

    def fit(self, data: Data, key: jax.Array) -> tuple[list[jax.Array], dict[Node, jax.Array]]:
        """Returns the weights on their grids, and the learned steps by quantizer."""
        count, drop = self.settings.steps, bool(self.settings.drop)
        params: Params = {
            "v": [start(w, g) for w, g in zip(self.kernels, self.grids, strict=True)],
            "steps": {i: step for i, (step, _) in enumerate(self.starts)},
        }
        params = self._run(params, data, key, count, learn_v=True, learn_steps=drop)
        if self.learned and not drop:
            count, key = max(count // 4, 1), jax.random.fold_in(key, 1)
            params = self._run(params, data, key, count, learn_v=False, learn_steps=True)
        weights = self._weights(hard_weight, params["v"])
        return weights, {self.learned[i]: step for i, step in params["steps"].items()}

    def _weights(
        self, rounded: Callable[[jax.Array, jax.Array, Grid], jax.Array], vs: Sequence[jax.Array]
    ) -> list[jax.Array]:
        return [rounded(*a) for a in zip(self.kernels, vs, self.grids, strict=True)]

    def _run(
        self,
        params: Params,
        data: Data,
        key: jax.Array,
        count: int,
        *,
        learn_v: bool,
        learn_steps: bool,
    ) -> Params:
        """Runs Adam on V, on the steps, or on both; in compiled chunks."""
        settings = self.settings
        steps_lr = optax.cosine_decay_schedule(settings.step_lr, count)
        optimizers: dict[Any, Any] = {
            "v": optax.adam(settings.lr) if learn_v else optax.set_to_zero(),
            "steps": optax.adam(steps_lr) if learn_steps else optax.set_to_zero(),
        }
        optimizer = optax.partition(optimizers, {"v": "v", "steps": "steps"})
        # Examples are not the first axis of what lies inside nn.vmap.
        entry, exit = map(self.traced.graph.batch_axis, (self.unit.entry, self.unit.exit))
        axes = entry, entry, exit

        def loss(
            params: Params, batch: Sequence[jax.Array], key: jax.Array, progress: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            before, entry, target = batch
            out = self._output(params, before, entry, key, hard=not learn_v)
            gap = jnp.square(out.astype(jnp.float32) - target)
            # Summed over channels, mean over examples and places, as the authors' code does.
            error = jnp.mean(jnp.sum(gap, axis=-1))
            if not learn_v:
                return error, error
            beta, counts = beta_at(progress)
            total = sum(penalty(v, beta) for v in params["v"])
            return error + settings.weight * jnp.where(counts, total, 0), error

        @jax.jit
        def chunk(
            params: Params,
            state: optax.OptState,
            data: Data,
            key: jax.Array,
            first: int,
            last: int,
        ) -> tuple[Params, optax.OptState, jax.Array]:
            def step(i: jax.Array, carry: tuple[Params, optax.OptState, jax.Array]) -> Any:
                params, state, total = carry
                draw, drop = jax.random.split(jax.random.fold_in(key, i))
                examples = data[0].shape[axes[0]]
                rows = jax.random.randint(draw, (settings.batch_size,), 0, examples)
                batch = [jnp.take(part, rows, axis) for part, axis in zip(data, axes, strict=True)]
                grad = jax.grad(loss, has_aux=True)
                grads, error = grad(params, batch, drop, i / count)
                updates, state = optimizer.update(grads, state, params)
                return optax.apply_updates(params, updates), state, total + error

            # A loop of any length: the last chunk is not compiled by itself.
            carry = params, state, jnp.float32(0)
            params, state, total = jax.lax.fori_loop(first, last, step, carry)
            return params, state, total / (last - first)

        state = optimizer.init(params)
        for first in range(0, count, CHUNK):
            last = min(first + CHUNK, count)
            params, state, error = chunk(params, state, data, key, first, last)
            self.report(self.unit.name, last, float(error))
        return params

    def _output(
        self, params: Params, before: jax.Array, entry: jax.Array, key: jax.Array, *, hard: bool
    ) -> jax.Array:
        """Returns the unit's output, activations dropped back to float at random."""
        weights = self._weights(hard_weight if hard else soft_weight, params["v"])
        drop = self.settings.drop
        keys = iter(jax.random.split(key, len(self.unit.inputs) + 1))

        def mixed(exact: jax.Array, quantized: jax.Array) -> jax.Array:
            if not drop:
                return quantized
            keep = jax.random.bernoulli(next(keys), drop, exact.shape)
            return jnp.where(keep, exact, quantized)

        def quantize(node: Node, x: jax.Array) -> jax.Array:
            if node not in self.learned:
                return mixed(x, self._fake_quant(node, x))
            index = self.learned.index(node)
            step, zero_point = params["steps"][index], self.starts[index][1]
            # The zero point stays: the offset follows the step.
            offset = None if zero_point is None else jax.lax.stop_gradient(-zero_point * step)
            spec = self.traced.spec(node)
            return mixed(x, numerics.staircase(x, step, spec, factor=1.0, offset=offset))

        x = mixed(entry, before)
        by_value = {n.outputs[0]: w for n, w in zip(self.unit.weights, weights, strict=True)}
        return run_unit(self.traced, self.unit, x, by_value, quantize=quantize)

    def _parameters(self, node: Node) -> tuple[jax.Array, jax.Array | None]:
        """Returns (step, zero point or None) of an activation's quantizer."""
        params = quantizer_params(self.traced, node)
        spec = self.traced.spec(node)
        step = jnp.asarray(params[facts(spec.quantizer).step])
        return step, None if spec.symmetric else jnp.asarray(grid_of(self.traced, node).zero_point)

    def _fake_quant(self, node: Node, x: jax.Array) -> jax.Array:
        spec = self.traced.spec(node)
        params = quantizer_params(self.traced, node)
        if not spec.dynamic:
            arrays = {k: jnp.asarray(v) for k, v in params.items()}
            return QUANTIZERS[spec.quantizer].fake_quant(x, arrays, spec)
        graph = self.traced.graph
        examples = x.shape[graph.batch_axis(node.inputs[0])]
        (out,) = execute(node, [x, *params.values()], graph.batch, examples)
        return x + jax.lax.stop_gradient(out - x)


def step_value(traced: TracedNet, node: Node) -> int:
    """Returns the graph's value of a quantizer's step."""
    names = sorted(quantizer_params(traced, node))
    return node.inputs[1 + names.index(facts(traced.spec(node).quantizer).step)]
