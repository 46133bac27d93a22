"""Learning how to round: AdaRound, BRECQ and QDrop.

Each takes a net that is calibrated, goes through its units in order, and learns for each unit which
weights are rounded up, so that the unit's output on calibration data is that of the float net:

    min_V  E |f(W~ x~) - f(W x)|^2 + weight * penalty(V)

x~ is what the units before, already done, give; x what the float net has. The weights that come
back lie on the grid of their quantizer, so the net is as it was: nothing new has to be stored or
deployed.

- `adaround`: layer by layer (Nagel et al., 2020, arXiv 2004.10568).
- `brecq`: block by block, then the steps of the activations too (Li et al., 2021, arXiv
  2102.05426). Their Fisher weighting of the error is left out, as their code does by default.
- `qdrop`: rounding and activation steps together, with half of the activations left unquantized at
  random (Wei et al., 2022, arXiv 2203.05740).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkd_jax import checks, numerics
from qkd_jax.graph import Node, execute
from qkd_jax.numerics import Grid
from qkd_jax.ptq.soft_rounding import beta_at, hard_weight, penalty, soft_weight, start
from qkd_jax.ptq.stream import Stream, image_batches
from qkd_jax.ptq.units import Unit, block_units, layer_units, run_unit
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import (
    TracedNet,
    grid_of,
    is_quantizer,
    products,
    quantizer_params,
    trace_net,
)
from qkd_jax.quantize.variables import is_calibrated, quantizer_path, refuse_folded
from qkd_jax.quantizers import QUANTIZERS, facts
from qkd_jax.trees import put

__all__ = ["Report", "adaround", "brecq", "qdrop"]

Tree = dict[str, Any]
Report = Callable[[str, int, float], None]
"""Called with (unit's layers, steps done, reconstruction error)."""

CHUNK = 100  # steps in one compiled scan: how often there is progress to report


@dataclasses.dataclass(frozen=True)
class _Method:
    """How a unit is learned.

    Attributes:
        steps: Adam steps.
        batch_size: examples a step.
        lr: learning rate of V.
        weight: weight of the penalty.
        step_lr: learning rate of the activations' steps; 0 leaves them.
        drop: share of activations that stay unquantized while learning.
    """

    steps: int
    batch_size: int
    lr: float
    weight: float
    step_lr: float = 0.0
    drop: float = 0.0


def adaround(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight: float = 0.01,
    seed: int = 0,
    report: Report | None = None,
    **kwargs: Any,
) -> Tree:
    """Learns the rounding of each layer's weights, one layer after the other.

    Args:
        net: the net.
        variables: calibrated. BatchNorm may be folded (before calibration) or not.
        batches: calibration images: arrays [batch, ...], or dicts with "image" (and "mask").
        steps: Adam steps a layer; the paper takes 10,000.
        batch_size: images a step.
        lr: Adam's learning rate for V.
        weight: lambda, the weight of the penalty.
        seed: of the minibatches.
        report: told the error of each unit as it falls.
        **kwargs: further arguments of the model's call.

    Returns:
        The variables with the weights on their grids.

    Raises:
        ValueError: variables that are not calibrated or whose BatchNorms are folded into
            multipliers; a weight quantizer without a fixed grid; no data; numbers out of range.
    """
    method = _Method(steps, batch_size, lr, weight)
    return _reconstruct(
        "adaround", net, variables, batches, layer_units, method, seed, report, kwargs
    )


def brecq(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight: float = 0.01,
    step_lr: float = 4e-5,
    seed: int = 0,
    report: Report | None = None,
    **kwargs: Any,
) -> Tree:
    """Learns the rounding block by block, then the steps of the block's activations.

    Args:
        net: the net.
        variables: calibrated. BatchNorm may be folded (before calibration) or not.
        batches: calibration images: arrays [batch, ...], or dicts with "image" (and "mask").
        steps: Adam steps a block for the rounding (the authors take 20,000), a quarter as many for
            the steps of the activations.
        batch_size: images a step.
        lr: Adam's learning rate for V.
        weight: lambda, the weight of the penalty.
        step_lr: Adam's learning rate for the activations' steps, with a cosine; 0 leaves them.
        seed: of the minibatches.
        report: told the error of each unit as it falls.
        **kwargs: further arguments of the model's call.

    Returns:
        The variables with the weights on their grids, and the activations' steps learned.

    Raises:
        ValueError: as `adaround`.
    """
    method = _Method(steps, batch_size, lr, weight, step_lr)
    return _reconstruct("brecq", net, variables, batches, block_units, method, seed, report, kwargs)


def qdrop(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight: float = 0.01,
    step_lr: float = 4e-5,
    drop: float = 0.5,
    seed: int = 0,
    report: Report | None = None,
    **kwargs: Any,
) -> Tree:
    """Learns rounding and activation steps together, with activations dropped back to float.

    While learning, each element of each activation is taken unquantized with the probability
    `drop`: at the block's entry from the float net, inside it from before its quantizer. The
    flatter minimum that this finds holds up better when all of them are quantized.

    Args:
        net: the net.
        variables: calibrated. BatchNorm may be folded (before calibration) or not.
        batches: calibration images: arrays [batch, ...], or dicts with "image" (and "mask").
        steps: Adam steps a block; the authors take 20,000.
        batch_size: images a step.
        lr: Adam's learning rate for V.
        weight: lambda, the weight of the penalty.
        step_lr: Adam's learning rate for the activations' steps, with a cosine; 0 leaves them.
        drop: probability of an element to stay unquantized.
        seed: of the minibatches and of the drops.
        report: told the error of each unit as it falls.
        **kwargs: further arguments of the model's call.

    Returns:
        The variables with the weights on their grids, and the activations' steps learned.

    Raises:
        ValueError: as `adaround`.
    """
    checks.number("drop", drop, low=0.0, high=1.0)
    method = _Method(steps, batch_size, lr, weight, step_lr, drop)
    return _reconstruct("qdrop", net, variables, batches, block_units, method, seed, report, kwargs)


class _Floats(Stream):
    """The calibration images on their way through the float net: no quantizer acts."""

    def _step(self, node: Node) -> None:
        if not is_quantizer(node):
            super()._step(node)
            return
        self._at += 1
        for env in self._envs:
            source = node.inputs[0]
            known = env[source] if source in env else self.graph.constants[source]
            env[node.outputs[0]] = jnp.asarray(known)


def _reconstruct(name, net, variables, batches, units_of, method, seed, report, kwargs) -> Tree:
    checks.integer_in("steps", method.steps, 1)
    checks.integer_in("batch_size", method.batch_size, 1)
    for key in ("lr", "weight", "step_lr"):
        checks.number(key, getattr(method, key), low=0.0)
    images = np.concatenate(image_batches(batches))
    if not is_calibrated(variables):
        raise ValueError(
            f"variables are not calibrated; {name} rounds to a grid. `calibrate` first."
        )
    traced = trace_net(net, variables, images[:1], **kwargs)
    refuse_folded(name, traced.multipliers)
    _check(name, traced)
    floats, quantized = _Floats(traced.graph, [images]), Stream(traced.graph, [images])
    key = jax.random.key(seed)
    result: Tree = dict(variables)
    for place, unit in enumerate(units_of(traced)):
        producer = traced.graph.producer(unit.entry)
        if producer is not None:
            quantized.run(producer)
            floats.run(producer)
        (before,), (entry,) = quantized.values(unit.entry), floats.values(unit.entry)
        floats.run(unit.nodes[-1])
        (target,) = floats.values(unit.exit)
        learner = _Learner(traced, unit, method)
        weights, steps = learner.fit(
            before, entry, target, jax.random.fold_in(key, place), report or (lambda *_: None)
        )
        for node, value in zip(unit.weights, weights, strict=True):
            quantized.replace(node.outputs[0], lambda _, value=value: value)
            result = put(result, traced.graph.leaves[node.inputs[0]], value)
        for node, value in steps.items():
            path, operand = node.params["path"], node.params["operand"]
            field = facts(traced.spec(node).quantizer).step
            quantized.replace(_step_value(traced, node), lambda _, value=value: value)
            result = put(result, quantizer_path(path, operand, field), value)
    return result


def _check(name: str, traced: TracedNet) -> None:
    for product in products(traced.graph):
        weight = product.weight
        if weight is None or weight.marker is None or not weight.quantized:
            continue
        spec, marker = traced.spec(weight.marker), weight.marker
        where = f"weight of layer {product.path!r} ({spec.label})"
        if not facts(spec.quantizer).step or spec.dynamic:
            having = tuple(quantizer for quantizer in QUANTIZERS if facts(quantizer).step)
            raise ValueError(
                f"{where}: {name} learns roundings on a grid that stays, which {having} have, and "
                "static ranges. Use one of them for weights."
            )
        grid_of(traced, marker)  # raises for groups
        plain = traced.graph.leaves.get(marker.inputs[0], "").startswith("params/")
        if not plain or weight.moves:
            raise ValueError(
                f"{where}: its kernel is not a parameter of its own (a slice of a scanned layer, "
                f"or a rearranged one), so {name} has no place for what it learns. Leave the layer "
                "in float, or unroll the loop."
            )


class _Learner:
    """Learns one unit: V of each weight, and the steps of its activations."""

    def __init__(self, traced: TracedNet, unit: Unit, method: _Method):
        self.traced, self.unit, self.method = traced, unit, method
        constants = traced.graph.constants
        self.kernels = [jnp.asarray(constants[n.inputs[0]], jnp.float32) for n in unit.weights]
        grids = [grid_of(traced, node) for node in unit.weights]
        self.grids = [
            Grid(jnp.asarray(grid.scale), jnp.asarray(grid.zero_point), grid.format)
            for grid in grids
        ]
        self.learned = [
            node
            for node in unit.inputs
            if method.step_lr > 0
            and facts(traced.spec(node).quantizer).step
            and not traced.spec(node).dynamic
        ]
        # (step, zero point or None), known before anything is traced.
        self.starts = [self._parameters(node) for node in self.learned]

    def fit(self, before, entry, target, key, report) -> tuple[list[jax.Array], dict[Node, Any]]:
        """Returns the weights on their grids, and the learned steps by quantizer."""
        method = self.method
        vs = [start(w, g) for w, g in zip(self.kernels, self.grids, strict=True)]
        steps = {i: step for i, (step, _) in enumerate(self.starts)}
        data = (before, entry, target)
        if method.drop or not self.learned:
            vs, steps = self._run(
                vs, steps, data, key, report, method.steps, True, bool(method.drop)
            )
            return self._hard(vs), {self.learned[i]: s for i, s in steps.items()}
        vs, _ = self._run(vs, steps, data, key, report, method.steps, True, False)
        count = max(method.steps // 4, 1)
        key = jax.random.fold_in(key, 1)
        _, steps = self._run(vs, steps, data, key, report, count, False, True)
        return self._hard(vs), {self.learned[i]: s for i, s in steps.items()}

    def _hard(self, vs) -> list[jax.Array]:
        return [hard_weight(*a) for a in zip(self.kernels, vs, self.grids, strict=True)]

    def _run(self, vs, steps, data, key, report, count, learn_v, learn_steps):
        """Adam on V, on the steps, or on both; in compiled chunks."""
        method = self.method
        optimizers: dict[Any, Any] = {
            "v": optax.adam(method.lr) if learn_v else optax.set_to_zero(),
            "steps": optax.adam(optax.cosine_decay_schedule(method.step_lr, count))
            if learn_steps
            else optax.set_to_zero(),
        }
        optimizer = optax.partition(optimizers, {"v": "v", "steps": "steps"})
        params = {"v": vs, "steps": steps}

        def loss(params, batch, key, progress):
            before, entry, target = batch
            out = self._output(params, before, entry, key, hard=not learn_v)
            gap = jnp.square(out.astype(jnp.float32) - target)
            # Summed over channels, mean over examples and places, as the authors' code does.
            error = jnp.mean(jnp.sum(gap, axis=-1))
            if not learn_v:
                return error, error
            beta, counts = beta_at(progress)
            pressed = sum(penalty(v, beta) for v in params["v"])
            return error + method.weight * jnp.where(counts, pressed, 0), error

        @functools.partial(jax.jit, static_argnames="length")
        def chunk(params, state, data, key, first, length):
            def step(carry, i):
                params, state = carry
                draw, drop = jax.random.split(jax.random.fold_in(key, i))
                rows = jax.random.randint(draw, (method.batch_size,), 0, data[0].shape[0])
                batch = [part[rows] for part in data]
                grad = jax.grad(loss, has_aux=True)
                grads, error = grad(params, batch, drop, i / count)
                updates, state = optimizer.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), error

            indices = first + jnp.arange(length)
            (params, state), errors = jax.lax.scan(step, (params, state), indices)
            return params, state, jnp.mean(errors)

        state = optimizer.init(params)
        for first in range(0, count, CHUNK):
            length = min(CHUNK, count - first)
            params, state, error = chunk(params, state, data, key, first, length)
            report(self.unit.name, first + length, float(error))
        return params["v"], params["steps"]

    def _output(self, params, before, entry, key, *, hard: bool):
        rounded = hard_weight if hard else soft_weight
        weights = {
            node.outputs[0]: rounded(w, v, g)
            for node, w, v, g in zip(
                self.unit.weights, self.kernels, params["v"], self.grids, strict=True
            )
        }
        drop = self.method.drop
        keys = iter(jax.random.split(key, len(self.unit.inputs) + 1))

        def mixed(exact: jax.Array, quantized: jax.Array) -> jax.Array:
            if not drop:
                return quantized
            keep = jax.random.bernoulli(next(keys), drop, exact.shape)
            return jnp.where(keep, exact, quantized)

        def quantize(node: Node, x: jax.Array) -> jax.Array:
            if node in self.learned:
                place = self.learned.index(node)
                step, zero_point = params["steps"][place], self.starts[place][1]
                # The zero point stays: the offset follows the step.
                offset = None if zero_point is None else jax.lax.stop_gradient(-zero_point * step)
                spec = self.traced.spec(node)
                return mixed(x, numerics.staircase(x, step, spec, factor=1.0, offset=offset))
            return mixed(x, self._fake_quant(node, x))

        x = mixed(entry, before)
        return run_unit(self.traced, self.unit, x, weights, quantize=quantize)

    def _parameters(self, node: Node) -> tuple[jax.Array, jax.Array | None]:
        """(step, zero point or None) of an activation's quantizer."""
        params = quantizer_params(self.traced, node)
        spec = self.traced.spec(node)
        step = jnp.asarray(params[facts(spec.quantizer).step])
        if spec.symmetric:
            return step, None
        return step, jnp.asarray(grid_of(self.traced, node).zero_point)

    def _fake_quant(self, node: Node, x: jax.Array) -> jax.Array:
        spec = self.traced.spec(node)
        params = quantizer_params(self.traced, node)
        if not spec.dynamic:
            given = {k: jnp.asarray(v) for k, v in params.items()}
            return QUANTIZERS[spec.quantizer].fake_quant(x, given, spec)
        graph = self.traced.graph
        (out,) = execute(node, [x, *params.values()], graph.batch, x.shape[0])
        return x + jax.lax.stop_gradient(out - x)


def _step_value(traced: TracedNet, node: Node) -> int:
    """The graph's value of a quantizer's step."""
    names = sorted(quantizer_params(traced, node))
    return node.inputs[1 + names.index(facts(traced.spec(node).quantizer).step)]
