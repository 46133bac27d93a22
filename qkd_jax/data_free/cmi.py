"""CMI: images from generators, each batch unlike those before it (Fang et al. 2021).

    made = cmi(net, variables, student=(other, its_variables), image_shape=..., count=..., ...)

What is made is a data set. As in the paper a student learns between two batches, to be adversary
to; the paper's learns on to the end, ours is a copy that is dropped, and the student itself learns
from the images afterwards, as from any other data set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from qkd_jax import checks
from qkd_jax.data_free.generator import (
    Generator,
    check_fields,
    finite,
    in_range,
    new_generator,
    random_crops,
    random_shifts,
    told,
    window,
)
from qkd_jax.data_free.inversion import (
    Synthesis,
    batch_norm_inputs,
    classes_wanted,
    deep_inversion_distance,
)
from qkd_jax.distillation.forward import forward
from qkd_jax.losses import kd
from qkd_jax.losses.inputs.feature_maps import inner, unit
from qkd_jax.quantize.interception import ROUNDING
from qkd_jax.training.state import jit_once, join, split

__all__ = ["Projector", "adversarial_loss", "check_cmi", "cmi", "cmi_steps", "contrast_loss"]

STUDENT_DECAY = 1e-4


class Projector(nn.Module):
    """Two dense layers from descriptions to unit vectors of size `dim`."""

    dim: int = 256

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Projects features [batch, any] to [batch, dim]."""
        x = nn.relu(nn.Dense(features.shape[-1], name="hidden")(features))
        return unit(nn.Dense(self.dim, name="embedding")(x))


def adversarial_loss(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """-mean_b 1[both give b the same class] KL(p_teacher || p_student): a scalar.

    The gradient flows through both nets to the images. Images on which the nets disagree already
    count as 0, so that the generator does not leave the teacher's classes.

    Reference:
        Fang et al., 2021, arXiv 2105.08584, and the authors' code.
    """
    log_s = jax.nn.log_softmax(student_logits.astype(jnp.float32))
    log_t = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
    apart = jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
    same = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
    return -jnp.mean(jnp.where(same, apart, 0))


def contrast_loss(
    local: jax.Array, whole: jax.Array, known: jax.Array, *, count: int, temperature: ArrayLike
) -> jax.Array:
    """Tells each image's local view from the views of all others: a scalar.

    With unit vectors u_i of local views and v_i of whole ones, i over the batch and what is known
    of earlier images,

        l_i = -log(exp(u_i . v_i / T) / sum_j exp(u_i . v_j / T))

    and the loss is the mean of l over the batch, plus that over earlier images if there are any. No
    gradient flows into v.

    Args:
        local: [images, dim], the batch first.
        whole: The same images, seen whole.
        known: [images] bool, False where an earlier image's place is still empty.
        count: Images of the batch.
        temperature: T.

    Reference:
        Fang et al., 2021, arXiv 2105.08584, and the authors' code.
    """
    scores = inner(local, jax.lax.stop_gradient(whole)) / temperature
    scores = jnp.where(known[None, :], scores, -jnp.inf)
    loss = jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(jnp.where(known, scores, 0))
    earlier = known[count:]
    of_earlier = jnp.sum(jnp.where(earlier, loss[count:], 0)) / jnp.maximum(jnp.sum(earlier), 1)
    return jnp.mean(loss[:count]) + of_earlier


def cmi(
    net: Any,
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int],
    count: int,
    key: jax.Array,
    bounds: tuple[Any, Any],
    student: tuple[Any, Mapping[str, Any]] | None = None,
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
        net: QuantizedModel with BatchNorm, float or not.
        variables: Its variables.
        image_shape: (height, width, channels).
        count: Images to make, in batches of near-equal size.
        key: Of weights, noise and views; the result is a pure function of it.
        bounds: (low, high) of pixels as the net takes them, broadcast against [batch, H, W, C].
        student: (QuantizedModel, variables) to be adversary to. A copy starts from these and learns
            by KL from all images so far between two batches. None leaves the term out.
        batch_size: Most images that are made together.
        steps: Of Adam for each batch, b1 = 0.5.
        lr: Its rate, which stays.
        latent: Size of the noise.
        width: Channels of the generator.
        bn_weight: See above.
        one_hot_weight: Likewise.
        contrast_weight: Likewise.
        adversarial_weight: Likewise.
        temperature: Of the contrast.
        embedding: Size of the projected descriptions.
        memory: Earlier images that are remembered.
        shift: The whole view is shifted by up to so many pixels.
        flip: Whether views are mirrored at random.
        smallest_crop: Smallest area of the window, of the image's.
        student_steps: Steps of SGD of the student's copy between two batches.
        student_lr: Their rate; momentum 0.9, weight decay 1e-4.
        student_temperature: Of its KL.
        labels: [count] classes to aim at; None deals them out in turn.
        report: Called as report(step, loss) after every step, of generators and student, from 1;
            the loss is a generator's, and None but for now and then.

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
    weights = {
        "bn_weight": bn_weight,
        "one_hot_weight": one_hot_weight,
        "contrast_weight": contrast_weight,
        "adversarial_weight": adversarial_weight,
    }
    numbers = {"lr": lr, "temperature": temperature, **weights}
    sizes = {"batch_size": batch_size, "steps": steps, "latent": latent, "width": width}
    sizes |= {"embedding": embedding, "memory": memory, "shift": shift}
    of_copy = {"student_lr": student_lr, "student_temperature": student_temperature}
    checks.integer_in("count", count, 1)
    of_copy |= {"student_steps": student_steps, "smallest_crop": smallest_crop}
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
    copy = None if student is None else _start(student[1])
    done = filled = 0
    for batch, group in enumerate(groups):
        batch_key = jax.random.fold_in(key, 1 + batch)
        carry = _fresh(models, batch_key, len(group), latent, features, head, head_state)
        known = np.arange(len(bank)) < filled
        opponent = None if copy is None else copy[0]
        view = _views(len(group), tuple(image_shape[:2]), shift, flip)
        for step in range(1, steps + 1):
            views = view(jax.random.fold_in(batch_key, 2), step, smallest_crop)
            carry, loss = _descend(
                models, variables, opponent, carry, views, bank, known, group, numbers, bounds
            )
            done += 1
            if report is not None:
                report(done, told(loss, step, steps))
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
        seen = jax.device_put(pool)
        draw = _draws(min(batch_size, count), tuple(image_shape[:2]), shift, flip)
        for step in range(1, student_steps + 1):
            drawn = draw(jax.random.fold_in(batch_key, 3), step, filled)
            copy = _learn(models, variables, copy, seen, drawn, of_student, bounds)
            done += 1
            if report is not None:
                report(done, None)
    return finite(np.asarray(in_range(jnp.asarray(pool), bounds)), wanted, lr)


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
    """How many steps `cmi` reports; `student_steps` is 0 without a student."""
    batches = -(-count // batch_size)
    return batches * steps + (batches - 1) * student_steps


class _Models(NamedTuple):
    """What a step is compiled for."""

    net: Any
    generator: Generator
    projector: Projector
    student: Any


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
        logits, found = batch_norm_inputs(models.net, variables, images, _MEANS)
        return logits, _described(found["means"])

    shape = jax.ShapeDtypeStruct((2, *models.generator.image_shape), np.float32)
    logits, described = jax.eval_shape(look, shape)
    return logits.shape[-1], described.shape[-1]


def _fresh(
    models: _Models,
    key: jax.Array,
    count: int,
    latent: int,
    features: int,
    head: Any,
    head_state: Any,
) -> dict[str, Any]:
    """The start of a batch: a new generator, new noise, the projector as it has become."""
    made = new_generator(models.generator, jax.random.fold_in(key, 0), latent)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (count, latent))
    trained = {"generator": made["params"], "noise": noise}
    return {
        "stats": made["batch_stats"],
        "trained": {**trained, "head": head},
        "states": {"images": optax.scale_by_adam(b1=0.5).init(trained), "head": head_state},
        "best": {
            "loss": jnp.float32(jnp.inf),
            "pixels": jnp.zeros((count, *models.generator.image_shape)),
            "features": jnp.zeros((count, 2, features)),
        },
    }


# What is random is drawn by programs of its own, compiled without optimization: XLA takes seconds
# to optimize a generator of random numbers on CPU.


@functools.lru_cache(maxsize=16)
def _views(count: int, size: tuple[int, int], shift: int, flip: bool) -> Any:
    """Compiled (key, number, smallest crop) -> ((boxes, mirrored) of whole and local views)."""

    def draw(key: jax.Array, number: jax.Array, smallest: jax.Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        mirrored = jax.random.bernoulli(keys[2], shape=(2, count)) & flip
        whole = random_shifts(keys[0], count, size, shift)
        return (whole, mirrored[0]), (random_crops(keys[1], count, size, smallest), mirrored[1])

    return jit_once(draw)


@functools.lru_cache(maxsize=16)
def _draws(count: int, size: tuple[int, int], shift: int, flip: bool) -> Any:
    """Compiled (key, number, images so far) -> (rows, their whole views, keys of the net)."""

    def draw(key: jax.Array, number: jax.Array, filled: jax.Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, number), 5)
        rows = jax.random.randint(keys[0], (count,), 0, filled)
        mirrored = jax.random.bernoulli(keys[1], shape=(count,)) & flip
        view = (random_shifts(keys[2], count, size, shift), mirrored)
        return rows, view, {"dropout": keys[3], ROUNDING: keys[4]}

    return jit_once(draw)


def _seen(pixels: jax.Array, view: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Images as a view shows them."""
    boxes, mirrored = view
    shown = window(pixels, boxes)
    return jnp.where(mirrored[:, None, None, None], shown[:, :, ::-1], shown)


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
        made = {"params": trained["generator"], "batch_stats": carry["stats"]}
        pixels, _ = models.generator.apply(made, trained["noise"], mutable=["batch_stats"])
        whole, local = (in_range(_seen(pixels, view), bounds) for view in views)
        logits, found = batch_norm_inputs(models.net, variables, whole, _BOTH)
        _, of_local = batch_norm_inputs(models.net, variables, local, _MEANS)
        features = jnp.stack([_described(of_local["means"]), _described(found["means"])], axis=1)
        rows = jnp.concatenate([features, bank])
        projected: Any = models.projector.apply(trained["head"], rows)
        everywhere = jnp.concatenate([jnp.ones(count, bool), known])
        contrast = contrast_loss(
            projected[:, 0],
            projected[:, 1],
            everywhere,
            count=count,
            temperature=numbers["temperature"],
        )
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = numbers["bn_weight"] * sum(jnp.sum(x) for x in found["distances"])
        loss += numbers["one_hot_weight"] * jnp.mean(entropy)
        loss += numbers["contrast_weight"] * contrast
        if models.student is not None:
            theirs, _ = forward(models.student, opponent, whole)
            loss += numbers["adversarial_weight"] * adversarial_loss(theirs, logits)
        return loss, {"pixels": pixels, "features": features}

    (loss, seen), gradient = jax.value_and_grad(loss_of, has_aux=True)(carry["trained"])
    best = {"loss": loss, **seen}
    better = loss < carry["best"]["loss"]
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), best, carry["best"])
    of_head = gradient.pop("head")
    states = carry["states"]
    found, images_state = optax.scale_by_adam(b1=0.5).update(gradient, states["images"])
    for_head, head_state = optax.scale_by_adam().update(of_head, states["head"])
    moved = {**cast(dict[str, Any], found), "head": for_head}
    trained = jax.tree.map(lambda x, u: x - numbers["lr"] * u, carry["trained"], moved)
    states = {"images": images_state, "head": head_state}
    return {"stats": carry["stats"], "trained": trained, "states": states, "best": best}, loss


def _start(variables: Mapping[str, Any]) -> tuple[Any, Any]:
    """The student's copy at the start: (variables, momentum)."""
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
    images = in_range(_seen(pool[rows], view), bounds)
    taught, _ = forward(models.net, variables, images)
    learned, carried = split(copy[0])

    def loss_of(learned: Any) -> tuple[jax.Array, Any]:
        logits, updated = forward(
            models.student, join(learned, carried), images, train=True, rngs=rngs
        )
        return jnp.mean(kd(logits, taught, temperature=numbers["temperature"])), updated

    gradient, carried = jax.grad(loss_of, has_aux=True)(learned)
    momentum = jax.tree.map(
        lambda m, g, x: 0.9 * m + g + STUDENT_DECAY * x, copy[1], gradient, learned
    )
    learned = jax.tree.map(lambda x, m: x - numbers["lr"] * m, learned, momentum)
    return join(learned, carried), momentum
