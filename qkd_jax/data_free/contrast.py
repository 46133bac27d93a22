"""The losses of CMI: contrast between views of images, and an adversary (Fang et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qkd_jax.losses.inputs.feature_maps import inner, unit


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
    divergence = jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
    same = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
    return -jnp.mean(jnp.where(same, divergence, 0))


def contrast_loss(
    local: jax.Array, whole: jax.Array, known: jax.Array, *, count: int, temperature: ArrayLike
) -> jax.Array:
    """Contrast of each image's local view with the whole views of all images: a scalar.

    With unit vectors u_i of local views and v_i of whole ones, i over the batch and the known
    earlier images,

        l_i = -log(exp(u_i . v_i / T) / sum_j exp(u_i . v_j / T))

    and the loss is the mean of l over the batch, plus that over earlier images if there are any. No
    gradient flows into v.

    Args:
        local: [images, dim], the batch first.
        whole: the same images, seen whole.
        known: [images] bool, False where an earlier image's slot is still empty.
        count: images of the batch.
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
