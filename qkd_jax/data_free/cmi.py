"""CMI: images from generators, each batch unlike those before it (Fang et al. 2021).

    made = cmi(net, variables, student=(other, its_variables), image_shape=..., count=..., ...)

The result is a data set. As in the paper a student, to which the images are adversarial, learns
between two batches. The paper's is the final student; ours is a copy that is dropped, and the
student itself learns from the images afterwards, as from any other data set.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkd_jax import checks
from qkd_jax.data_free.batch_norm import batch_norm_inputs, deep_inversion_distance
from qkd_jax.data_free.contrast import Projector, adversarial_loss, contrast_loss
from qkd_jax.data_free.generator import Generator, in_range, new_generator
from qkd_jax.data_free.synthesis import (
    Synthesis,
    check_fields,
    classes_wanted,
    loss_to_report,
    synthesis,
)
from qkd_jax.data_free.windows import View, random_crops, random_shifts, show
from qkd_jax.distillation.forward import forward
from qkd_jax.losses import kd
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.operands import ROUNDING
from qkd_jax.training.state import jit_once, join, split

STUDENT_DECAY = 1e-4


def cmi(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int],
    count: int,
    key: jax.Array,
    bounds: tuple[Any, Any],
    student: tuple[QuantizedModel, Mapping[str, Any]] | None = None,
    batch_size: int = 256,
    steps: int = 200,
    lr: float = 1e-3,
    latent: int = 256,
    width: int = 64,
    bn_weight: float = 1.0,
    one_hot_weight: float = 1.0,
    contrast_weight: float = 0.8,
    adversarial_weight: float = 0.5,
    temperature: float = 0.1,
    embedding: int = 256,
    memory: int = 4096,
    shift: int = 4,
    flip: bool = False,
    smallest_crop: float = 0.25,
    student_steps: int = 400,
    student_lr: float = 0.1,
    student_temperature: float = 20.0,
    labels: np.ndarray | None = None,
    report: Callable[[int, float | None], None] | None = None,
) -> Synthesis:
    """Makes images batch by batch, each with a new generator, from a net's BatchNorms.

        bn_weight sum_l (||mean_l - running mean_l|| + ||var_l - running var_l||)
            + one_hot_weight CE(net(x), y) + contrast_weight contrast_loss
            + adversarial_weight adversarial_loss

    The contrast is between two views of an image, shifted and a window enlarged, and those of the
    last `memory` images; a view is described by the means over its positions of what the BatchNorms
    normalise, behind a `Projector`. The generator's weights and its noise descend together, and the
    images kept are those of the step with the lowest loss.

    Args:
        net: a net with BatchNorm, float or quantized.
        variables: its variables.
        image_shape: (height, width, channels).
        count: images to make, in batches of near-equal size.
        key: of weights, noise and views; the result is a pure function of it.
        bounds: (low, high) of pixels as the net takes them, broadcast against [batch, H, W, C].
        student: (QuantizedModel, variables) to be adversary to. A copy starts from these and learns
            by KL from all images so far between two batches. None leaves the term out.
        batch_size: most images that are made together.
        steps: of Adam for each batch, b1 = 0.5.
        lr: its learning rate, constant.
        latent: size of the noise.
        width: channels of the generator.
        bn_weight: factor of the distance to the BatchNorms' statistics.
        one_hot_weight: factor of the cross-entropy.
        contrast_weight: factor of `contrast_loss`.
        adversarial_weight: factor of `adversarial_loss`.
        temperature: of the contrast.
        embedding: size of the projected descriptions.
        memory: earlier images that are remembered.
        shift: largest shift of the whole view, in pixels.
        flip: whether views are mirrored at random.
        smallest_crop: smallest area of the local view, as a fraction of the image's.
        student_steps: steps of SGD of the student's copy between two batches.
        student_lr: their rate; momentum 0.9, weight decay 1e-4.
        student_temperature: of its KL.
        labels: [count] classes to aim at; None deals them out in turn.
        report: called as report(step, loss) after every step, of generators and student, from 1;
            the loss is a generator's, and None except every 50 steps and at a batch's last.

    Returns:
        Images and labels.

    Raises:
        ValueError: No BatchNorm, one that is folded, numbers out of range, or images that are not
            finite.

    Note:
        The numbers are those of the authors' CIFAR-10 code, which makes 256 images for each of 40
        to 200 rounds, of 400 to 2000 steps of the student. It remembers 40,960 images and draws
        4,096 at each step, starts the generator's weights from N(0, 0.02^2), and may go on from
        images made beforehand.

    Reference:
        Fang et al., 2021, arXiv 2105.08584.
    """
    numbers = {
        "lr": lr,
        "temperature": temperature,
        "bn_weight": bn_weight,
        "one_hot_weight": one_hot_weight,
        "contrast_weight": contrast_weight,
        "adversarial_weight": adversarial_weight,
    }
    sizes = {"batch_size": batch_size, "steps": steps, "latent": latent, "width": width}
    sizes |= {"embedding": embedding, "memory": memory, "shift": shift}
    of_copy = {"student_lr": student_lr, "student_temperature": student_temperature}
    of_copy |= {"student_steps": student_steps, "smallest_crop": smallest_crop}
    checks.integer_in("count", count, 1)
    check_cmi({**numbers, **sizes, **of_copy}, image_shape)
    models = _Models(
        net,
        Generator(tuple(image_shape), width),
        Projector(embedding),
        None if student is None else student[0],
    )
    classes, features = _sizes(models, variables)
    wanted = classes_wanted(labels, count, classes)
    groups = np.array_split(wanted, -(-count // batch_size))
    of_student = {"lr": student_lr, "temperature": student_temperature}
    described = np.zeros((1, features), np.float32)
    head = jit_once(models.projector.init)(jax.random.fold_in(key, 0), described)
    head_state = optax.scale_by_adam().init(head)
    bank = np.zeros((min(memory, count - len(groups[-1])), 2, features), np.float32)
    pool = np.zeros((count, *image_shape), np.float32)
    copy = None if student is None else _start_copy(student[1])
    done = filled = 0
    size = (image_shape[0], image_shape[1])
    for batch, group in enumerate(groups):
        batch_key = jax.random.fold_in(key, 1 + batch)
        carry = _start_batch(models, batch_key, len(group), latent, features, head, head_state)
        known = np.arange(len(bank)) < filled
        opponent = None if copy is None else copy[0]
        draw_views = _views(len(group), size, shift, flip)
        for step in range(1, steps + 1):
            views = draw_views(jax.random.fold_in(batch_key, 2), step, smallest_crop)
            carry, loss = _descend(
                models, variables, opponent, carry, views, bank, known, group, numbers, bounds
            )
            done += 1
            if report is not None:
                report(done, loss_to_report(loss, step, steps))
        if not np.isfinite(carry["best"]["loss"]):
            raise ValueError(
                f"no loss of batch {batch + 1} is finite; lower lr, now {lr}, or student_lr, now "
                f"{student_lr}."
            )
        head, head_state = carry["trained"]["head"], carry["states"]["head"]
        pool[filled : filled + len(group)] = carry["best"]["pixels"]
        filled += len(group)
        bank = np.concatenate([carry["best"]["features"], bank])[: len(bank)]  # the newest first
        if copy is None or filled == count:
            continue
        images = jax.device_put(pool)
        draw = _draws(min(batch_size, count), size, shift, flip)
        for step in range(1, student_steps + 1):
            drawn = draw(jax.random.fold_in(batch_key, 3), step, filled)
            copy = _learn(models, variables, copy, images, drawn, of_student, bounds)
            done += 1
            if report is not None:
                report(done, None)
    return synthesis(np.asarray(in_range(jnp.asarray(pool), bounds)), wanted, lr)


def check_cmi(fields: Mapping[str, Any], image_shape: tuple[int, ...]) -> None:
    """Refuses numbers of `cmi` that are out of range."""
    check_fields(
        fields,
        sizes=("batch_size", "steps", "latent", "width", "embedding", "memory"),
        rates=("lr", "temperature", "student_lr", "student_temperature"),
        weights=("bn_weight", "one_hot_weight", "contrast_weight", "adversarial_weight"),
    )
    checks.integer_in("shift", fields["shift"], 0, min(image_shape[:2]) - 1)
    checks.integer_in("student_steps", fields["student_steps"], 0)
    checks.in_range("smallest_crop", fields["smallest_crop"], 0.01, 1)


def cmi_steps(count: int, batch_size: int, steps: int, student_steps: int) -> int:
    """Returns the number of steps that `cmi` reports; `student_steps` is 0 without a student."""
    batches = -(-count // batch_size)
    return batches * steps + (batches - 1) * student_steps


class _Models(NamedTuple):
    """The static part, for which a step is compiled."""

    net: QuantizedModel
    generator: Generator
    projector: Projector
    student: QuantizedModel | None


def _image_means(x: jax.Array, mean: Any, var: Any, axes: tuple[int, ...]) -> jax.Array:
    """[batch, channels]: the mean over each image's positions."""
    del mean, var
    positions = tuple(axis for axis in range(1, x.ndim) if axis not in axes)
    return jnp.mean(x.astype(jnp.float32), positions).reshape(x.shape[0], -1)


_MEANS = {"means": _image_means}
_BOTH = {"distances": deep_inversion_distance, **_MEANS}


def _described(means: list[jax.Array]) -> jax.Array:
    """[batch, features] out of the means of all BatchNorms, [layers of a scan..., batch, C]."""
    rows = [x.reshape(-1, *x.shape[-2:]) for x in means]
    return jnp.concatenate([layer for x in rows for layer in x], axis=-1)


def _sizes(models: _Models, variables: Any) -> tuple[int, int]:
    """(number of classes, size of an image's description)."""

    def look(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, measured = batch_norm_inputs(models.net, variables, images, _MEANS)
        return logits, _described(measured["means"])

    shape = jax.ShapeDtypeStruct((2, *models.generator.image_shape), np.float32)
    logits, described = jax.eval_shape(look, shape)
    return logits.shape[-1], described.shape[-1]


def _start_batch(
    models: _Models,
    key: jax.Array,
    count: int,
    latent: int,
    features: int,
    head: Any,
    head_state: Any,
) -> dict[str, Any]:
    """Returns the carry of a new batch: a new generator, new noise, the projector so far."""
    generator = new_generator(models.generator, jax.random.fold_in(key, 0), latent)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (count, latent))
    trained = {"generator": generator["params"], "noise": noise}
    return {
        "stats": generator["batch_stats"],
        "trained": {**trained, "head": head},
        "states": {"images": optax.scale_by_adam(b1=0.5).init(trained), "head": head_state},
        "best": {
            "loss": jnp.float32(jnp.inf),
            "pixels": jnp.zeros((count, *models.generator.image_shape)),
            "features": jnp.zeros((count, 2, features)),
        },
    }


# Random numbers are drawn by programs of their own, compiled without optimization: XLA takes
# seconds to optimize a random number generator on CPU.


@functools.lru_cache(maxsize=16)
def _views(
    count: int, size: tuple[int, int], shift: int, flip: bool
) -> Callable[..., tuple[View, View]]:
    """Compiled (key, number, smallest crop) -> (whole views, local views)."""

    def draw(key: jax.Array, number: jax.Array, smallest: jax.Array) -> tuple[View, View]:
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        mirrored = jax.random.bernoulli(keys[2], shape=(2, count)) & flip
        whole = random_shifts(keys[0], count, size, shift)
        return (whole, mirrored[0]), (random_crops(keys[1], count, size, smallest), mirrored[1])

    return jit_once(draw)


@functools.lru_cache(maxsize=16)
def _draws(count: int, size: tuple[int, int], shift: int, flip: bool) -> Callable[..., Any]:
    """Compiled (key, number, images so far) -> (rows, their whole views, keys of the net)."""

    def draw(key: jax.Array, number: jax.Array, filled: jax.Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, number), 5)
        rows = jax.random.randint(keys[0], (count,), 0, filled)
        mirrored = jax.random.bernoulli(keys[1], shape=(count,)) & flip
        view = (random_shifts(keys[2], count, size, shift), mirrored)
        return rows, view, {"dropout": keys[3], ROUNDING: keys[4]}

    return jit_once(draw)


@functools.partial(jax.jit, static_argnames=("models",))
def _descend(
    models: _Models,
    variables: Any,
    opponent: Any,
    carry: Any,
    views: Any,
    bank: jax.Array,
    known: jax.Array,
    labels: jax.Array,
    numbers: Mapping[str, jax.Array],
    bounds: Any,
) -> tuple[Any, jax.Array]:
    """One step of Adam on a generator, its noise and the projector: (carry, loss before it)."""
    count = labels.shape[0]

    def loss_of(trained: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        weights = {"params": trained["generator"], "batch_stats": carry["stats"]}
        pixels, _ = models.generator.apply(weights, trained["noise"], mutable=["batch_stats"])
        whole, local = (in_range(show(pixels, view), bounds) for view in views)
        logits, of_whole = batch_norm_inputs(models.net, variables, whole, _BOTH)
        _, of_local = batch_norm_inputs(models.net, variables, local, _MEANS)
        described = [_described(measured["means"]) for measured in (of_local, of_whole)]
        features = jnp.stack(described, axis=1)
        rows = jnp.concatenate([features, bank])
        projected: Any = models.projector.apply(trained["head"], rows)
        is_there = jnp.concatenate([jnp.ones(count, bool), known])
        contrast = contrast_loss(
            projected[:, 0],
            projected[:, 1],
            is_there,
            count=count,
            temperature=numbers["temperature"],
        )
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = numbers["bn_weight"] * sum(jnp.sum(x) for x in of_whole["distances"])
        loss += numbers["one_hot_weight"] * jnp.mean(entropy)
        loss += numbers["contrast_weight"] * contrast
        if models.student is not None:
            student_logits, _ = forward(models.student, opponent, whole)
            loss += numbers["adversarial_weight"] * adversarial_loss(student_logits, logits)
        return loss, {"pixels": pixels, "features": features}

    (loss, outputs), gradient = jax.value_and_grad(loss_of, has_aux=True)(carry["trained"])
    best = {"loss": loss, **outputs}
    better = loss < carry["best"]["loss"]
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), best, carry["best"])
    of_head = gradient.pop("head")
    states = dict(carry["states"])
    updates, states["images"] = optax.scale_by_adam(b1=0.5).update(gradient, states["images"])
    head, states["head"] = optax.scale_by_adam().update(of_head, states["head"])
    updates = {**cast(dict[str, Any], updates), "head": head}
    trained = jax.tree.map(lambda x, u: x - numbers["lr"] * u, carry["trained"], updates)
    return {"stats": carry["stats"], "trained": trained, "states": states, "best": best}, loss


def _start_copy(variables: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the student's copy: (variables, momentum)."""
    learned, _ = split(variables)
    return dict(variables), jax.tree.map(jnp.zeros_like, learned)


@functools.partial(jax.jit, static_argnames=("models",))
def _learn(
    models: _Models,
    variables: Any,
    copy: tuple[Any, Any],
    pool: jax.Array,
    drawn: Any,
    numbers: Mapping[str, jax.Array],
    bounds: Any,
) -> tuple[Any, Any]:
    """One step of SGD of the student's copy on images drawn from the pool."""
    rows, view, rngs = drawn
    student = models.student
    assert student is not None  # its copy is what learns here
    images = in_range(show(pool[rows], view), bounds)
    taught, _ = forward(models.net, variables, images)
    learned, carried = split(copy[0])

    def loss_of(learned: Any) -> tuple[jax.Array, Any]:
        logits, updated = forward(student, join(learned, carried), images, train=True, rngs=rngs)
        return jnp.mean(kd(logits, taught, temperature=numbers["temperature"])), updated

    gradient, carried = jax.grad(loss_of, has_aux=True)(learned)
    momentum = jax.tree.map(
        lambda m, g, x: 0.9 * m + g + STUDENT_DECAY * x, copy[1], gradient, learned
    )
    learned = jax.tree.map(lambda x, m: x - numbers["lr"] * m, learned, momentum)
    return join(learned, carried), momentum
