"""Sensitivity: the loss of a net with one of its layers quantized alone."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.mixed_precision.candidates import Bits, Candidate, Sensitivity, label
from qkd_jax.mixed_precision.hessian import mean_curvatures, weight_errors
from qkd_jax.numerics import Spec
from qkd_jax.quantize import QuantizedModel, Rule, inspection, quantize
from qkd_jax.quantize.calibration import calibrate, model_arguments
from qkd_jax.quantize.calls import explaining_failures
from qkd_jax.quantize.interception import Frame
from qkd_jax.quantize.operands import OperandHook, OperandUse
from qkd_jax.quantize.variables import without_quantizers

METRICS = ("mse", "kl", "hessian")

Tree = dict[str, Any]


def sensitivity(
    model: QuantizedModel | nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    bits: Sequence[Bits] = (2, 3, 4, 8),
    metric: str = "mse",
    base: Spec | None = None,
    observer: str | None = "mse",
    probes: int = 32,
    seed: int = 0,
    **kwargs: Any,
) -> Sensitivity:
    """Measures every layer at every choice of bits, with all other layers in float.

        mse      mean (f(x) - f_i(x))^2                          over the outputs of the net
        kl       mean KL(softmax f(x) || softmax f_i(x))
        hessian  max(tr(H_i) / n_i, 0) * ||W_q - W||^2           (HAWQ-V2, arXiv 1911.03852)

    with f_i the net whose layer i alone is quantized, and H_i the block of the loss' Hessian that
    belongs to the n_i weights of layer i (see `hessian`). The loss is the cross-entropy of the
    labels of batches that have them ("label"), else of the net's own predictions, whose Hessian is
    the Fisher matrix.

    One forward pass is compiled for each choice of bits, not for each layer: which layer is
    quantized is an argument of it. "hessian" compiles one double backward pass of the float net.

    Args:
        model: a quantized model, whose rules say how each layer is quantized but for its bits; or a
            linen module, for which `base` says so.
        variables: its float variables; quantizers are left out, what `fold_bn` left is kept.
        batches: images [batch, ...], dicts with "image" (and "label", "mask"), or tuples of one
            array; they calibrate and measure.
        bits: choices. A number: bits of the weight, inputs stay in float while this is measured. A
            pair: bits of the weight and of the input, both quantized.
        metric: "mse", "kl" or "hessian".
        base: spec of all weights (and inputs, made per tensor, if choices are pairs) of a linen
            module; None takes `Spec(8, granularity="channel")`.
        observer: a key of `OBSERVERS`, or None for what each spec says. The rules that `allocate`
            returns keep the specs' own.
        probes: number of Hutchinson's vectors a batch, for "hessian".
        seed: of these vectors.
        **kwargs: further arguments of the model's call.

    Returns:
        The table.

    Raises:
        ValueError: no batch, an unknown metric, a choice that a layer's quantizer refuses, no layer
            with a weight spec, a pair for a layer without an input spec, a float net whose outputs
            are not finite, or "hessian" with pairs or with layers inside `nn.scan`.
    """
    checks.one_of("metric", metric, METRICS)
    checks.integer_in("probes", probes, 1)
    choices = _choices(bits)
    pairs = any(isinstance(b, tuple) for b in choices)
    if metric == "hessian" and pairs:
        raise ValueError(
            f"metric='hessian' came with the bits {bits!r}; the trace belongs to weights. Give "
            "numbers of weight bits, or use metric='mse' or 'kl'."
        )
    net = _net(model, base, pairs)
    checks.list_of_batches(batches)
    given = [_unpacked(batch) for batch in batches]
    given = [(x, labels) for x, labels in given if x.shape[0]]
    if not given:
        raise ValueError("batches is empty; give at least one batch of real inputs.")
    images = [x for x, _ in given]
    floats = without_quantizers(variables)
    frame = Frame(net.spec_of)
    with explaining_failures(None):
        jax.eval_shape(lambda v, x: net.apply_in(frame, v, x, **kwargs), floats, images[0])
    infos = {info.path: info for info in inspection.layers(net, floats, images[0], **kwargs)}
    infos = {path: info for path, info in infos.items() if info.weight is not None}
    if not infos:
        raise ValueError(
            "no layer of this net has a weight spec, so there are no bits to choose. Give its "
            "rules one, such as Rule('.*', weight=Spec(8, granularity='channel'))."
        )
    rules = {choice: {path: _rule(net, path, choice) for path in infos} for choice in choices}

    logits_of = lambda v, x: _one_array(net.apply(v, x, **kwargs))
    references = [jax.jit(logits_of)(floats, x) for x in images]
    if not all(np.isfinite(reference).all() for reference in references):
        raise ValueError(
            "the float net's output is not finite on these batches; check the weights and the "
            "normalisation of the inputs."
        )
    curvatures = {}
    if metric == "hessian":
        shapes = {path: info.weight_shape for path, info in infos.items()}
        curvatures = mean_curvatures(logits_of, floats, given, shapes, probes=probes, seed=seed)

    operations, other_bops = _operations(net, floats, images[0], infos, kwargs)
    columns: list[dict[str, Candidate]] = []
    for choice in choices:
        chosen = quantize(net.model, [_measured(r, choice) for r in rules[choice].values()])
        quantized = calibrate(chosen, floats, images, observer=observer, **kwargs)
        if metric == "hessian":
            errors = weight_errors(chosen, quantized, images, **kwargs)
            loss = {path: max(curvatures[path], 0.0) * errors[path] for path in infos}
        else:
            loss = _losses(chosen, quantized, images, references, metric, tuple(infos), kwargs)
        stored = inspection.layers(chosen, quantized, images[0], **kwargs)
        kept = {info.path: info.bits for info in stored}
        column = {}
        for path, rule in rules[choice].items():
            if not math.isfinite(loss[path]):
                raise ValueError(
                    f"layer {path!r} at {label(choice)} bits has the {metric} {loss[path]}; leave "
                    "it out with a rule without a weight spec, or use another observer."
                )
            assert rule.weight is not None
            # Without a spec of its own the input may lie on the grid of another module's output.
            bops = sum(
                macs * rule.weight.bits * (rule.input.bits if rule.input else input_bits)
                for macs, input_bits in operations[path]
            )
            column[path] = Candidate(loss[path], kept[path], bops, rule)
        columns.append(column)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(floats.get("params", {})))
    return Sensitivity(
        metric=metric,
        bits=choices,
        layers={path: tuple(column[path] for column in columns) for path in infos},
        other_bits=32 * (total - sum(info.params for info in infos.values())),
        other_bops=other_bops,
        rules=net.rules,
        modules=tuple(sorted(frame.modules)),
        other_layers=tuple(path for path in frame.seen if path not in infos),
    )


def _choices(bits: Sequence[Bits]) -> tuple[Bits, ...]:
    if isinstance(bits, int) or not bits:
        raise ValueError(f"bits is {bits!r}; give a list of choices, such as (2, 4, 8).")
    choices = tuple(tuple(b) if isinstance(b, list | tuple) else b for b in bits)
    for index, choice in enumerate(choices):
        pair = choice if isinstance(choice, tuple) else (choice,)
        if isinstance(choice, tuple) and len(pair) != 2:
            raise ValueError(f"bits[{index}] is {choice!r}; a pair is (weight bits, input bits).")
        for number in pair:
            checks.integer_in(f"bits[{index}]", number, 1, 16)
    if len(set(choices)) < len(choices):
        raise ValueError(f"bits is {bits!r}, which has a choice twice; drop one of them.")
    return choices


def _net(model: QuantizedModel | nn.Module, base: Spec | None, pairs: bool) -> QuantizedModel:
    if isinstance(model, QuantizedModel):
        if base is not None:
            raise ValueError(
                "base came with a quantized model, whose rules say how its layers are quantized. "
                "Drop base, or give the linen module (`.model`)."
            )
        return model
    base = base or Spec(8, granularity="channel")
    inputs = dataclasses.replace(base, granularity="tensor") if pairs else None
    return quantize(model, [Rule(".*", weight=base, input=inputs)])


def _rule(net: QuantizedModel, path: str, choice: Bits) -> Rule:
    """The rule of one layer at one choice; its other specs are those of the net."""
    weight, inputs, output = (net.spec_of(path, name) for name in ("weight", "input", "output"))
    w, x = choice if isinstance(choice, tuple) else (choice, None)
    assert weight is not None  # only layers with a weight spec are measured
    if x is not None:
        if inputs is None:
            raise ValueError(
                f"bits has the pair {choice!r}, but the rules give layer {path!r} no input spec. "
                "Give it one, or choose numbers of weight bits."
            )
        inputs = dataclasses.replace(inputs, bits=x)
    return Rule(re.escape(path), dataclasses.replace(weight, bits=w), inputs, output)


def _measured(rule: Rule, choice: Bits) -> Rule:
    """The part of a rule that is quantized while its layer is measured."""
    inputs = rule.input if isinstance(choice, tuple) else None
    return dataclasses.replace(rule, input=inputs, output=None)


def _operations(
    net: QuantizedModel,
    floats: Tree,
    images: Any,
    paths: Iterable[str],
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, list[tuple[int, int]]], int]:
    """Returns ({layer: (multiply-accumulates, input bits) of its products}, bops of all others)."""
    own: dict[str, list[tuple[int, int]]] = {path: [] for path in paths}
    other = 0
    for p in inspection.coverage(net, floats, images, **kwargs).products:
        if p.path in own and p.status != "MISSED":
            own[p.path].append((p.macs, p.bits[1]))
        else:
            other += p.macs * p.bits[0] * p.bits[1]
    return own, other


def _unpacked(batch: Any) -> tuple[Any, Any]:
    """Returns (images, labels or None) without the padding of a last batch."""
    arguments = model_arguments(batch)
    if len(arguments) != 1:
        raise ValueError(
            f"a batch is a tuple of {len(arguments)}; sensitivity takes models of one input. Give "
            "images, or dicts with 'image' and 'label'."
        )
    if not isinstance(batch, Mapping) or "label" not in batch:
        return arguments[0], None
    labels = np.asarray(batch["label"])
    return arguments[0], labels[np.asarray(batch["mask"]) > 0] if "mask" in batch else labels


def _switching(on: Mapping[str, jax.Array]) -> OperandHook:
    """Returns a hook under which each layer's quantizers are on or off, by a traced flag."""

    def hook(use: OperandUse) -> tuple[jax.Array, None]:
        x_hat = use.quantize().x_hat
        # Without a grid the layer computes on these values, and is the float one where they are x.
        return jnp.where(on[use.path], x_hat, use.x) if use.path in on else x_hat, None

    return hook


def _losses(
    net: QuantizedModel,
    variables: Tree,
    images: Sequence[Any],
    references: Sequence[jax.Array],
    metric: str,
    paths: Sequence[str],
    kwargs: Mapping[str, Any],
) -> dict[str, float]:
    """Returns the loss with each layer quantized alone; one compilation serves them all."""

    @jax.jit
    def run(on: jax.Array, variables: Tree, x: jax.Array, reference: jax.Array) -> jax.Array:
        frame = Frame(net.spec_of, _switching(dict(zip(paths, on, strict=True))))
        out = _one_array(net.apply_in(frame, variables, x, **kwargs))
        return jnp.sum(_distance(metric, reference, out))

    count = sum(r.size if metric == "mse" else r.size // r.shape[-1] for r in references)
    found = {}
    for path, on in zip(paths, np.eye(len(paths), dtype=bool), strict=True):
        parts = [
            run(on, variables, x, reference)
            for x, reference in zip(images, references, strict=True)
        ]
        found[path] = math.fsum(map(float, parts)) / count
    return found


def _one_array(out: Any) -> jax.Array:
    if not isinstance(out, jax.Array) or out.ndim == 0:
        raise ValueError(
            f"the model returns {type(out).__name__}; sensitivity compares one array of outputs "
            "[batch, ...]. Wrap the model in a module that returns it alone."
        )
    return out.astype(jnp.promote_types(out.dtype, jnp.float32))


def _distance(metric: str, reference: jax.Array, out: jax.Array) -> jax.Array:
    if metric == "mse":
        return jnp.square(out - reference)
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(out)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
