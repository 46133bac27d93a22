"""Relation losses: how the examples of a batch lie to each other, in student and in teacher.

Each takes a feature of either net, usually the pooled vector, and flattens maps. Since only
relations are compared, the two may have unlike channels and sizes, and need no adaptor.

The result's row i holds the relations of example i to all others, and the mean over rows is the
published value. Under a mapped axis, `axis_name` relates the examples of all devices: 4 devices
give what 1 gives on the global batch.
"""

import itertools
import math

import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.losses.inputs.feature_maps import (
    GatheredBatch,
    adaptive_mean,
    gather_batch,
    gathered,
    inner,
    pooled_alike,
    prepare_feature_lists,
    prepare_features,
    safe_norm,
    total,
    unit,
)
from qkd_jax.losses.inputs.logits import keep, prepare_pair
from qkd_jax.losses.inputs.shapes import Array, Arrays, Feature, Kept, Logits, Mask, Scalar, Values


def rkd(
    student_feature: Feature,
    teacher_feature: Array,
    *,
    distance: Scalar = 25.0,
    angle: Scalar = 50.0,
    axis_name: str | None = None,
    where: Mask = None,
) -> Values:
    """Relational distillation: distances of pairs and angles of triples of examples.

    With d_ij = |f_i - f_j| over its mean (of the positive ones), e_ij = (f_j - f_i) / |f_j - f_i|,
    a_ijk = e_ij . e_ik, and h the Huber function (x^2 / 2 below 1, |x| - 1/2 above):

        L_i = distance mean_j h(d_ij^student - d_ij^teacher)
            + angle mean_jk h(a_ijk^student - a_ijk^teacher)

    Args:
        student_feature: f, [batch, ...]; the net that learns.
        teacher_feature: [batch, ...], any size; no gradient flows into it.
        distance: weight of the first term, >= 0.
        angle: weight of the second term, >= 0.
        axis_name: mapped axis over whose devices the batch is distributed.
        where: [batch] mask; examples where it is 0 or False are in no pair and no mean, and give 0.

    Returns:
        [batch], float32 or wider; 0 where all distances (up to one factor) and angles agree, so
        also for a batch of 1. Needs memory for batch^2 * channels and batch^3 numbers.

    Raises:
        ValueError: for shapes that do not fit, or negative weights.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(4), jnp.ones((4, 2)).cumsum(0)
        >>> print(qk.losses.rkd(student, teacher))
        [ 4.969 14.406 14.406  4.969]

    Note:
        Means run over batch^2 pairs and batch^3 triples, an example with itself included, as in the
        authors' code.

    Reference:
        Park et al., 2019, arXiv 1904.05068.
    """
    for name, value in (("distance", distance), ("angle", angle)):
        checks.number(name, value, low=0.0)
    batch, mask = _gather(student_feature, teacher_feature, where, axis_name)
    pairs = batch.pairs()[..., None]

    def relations(own: Array, everyone: Array) -> tuple[Array, Array]:
        gap = jnp.where(pairs, everyone[None, :, :] - own[:, None, :], 0)
        length = safe_norm(gap)
        positive = total(jnp.sum(length > 0), axis_name)
        mean = total(jnp.sum(length), axis_name) / jnp.maximum(positive, 1)
        scaled = length / jnp.where(mean > 0, mean, 1)
        direction = unit(gap)
        angles = jnp.einsum("ijd,ikd->ijk", direction, direction, precision="highest")
        return scaled, angles

    distance_s, angle_s = relations(batch.student, batch.all_student)
    distance_t, angle_t = relations(batch.teacher, batch.all_teacher)
    of_pairs = jnp.sum(_huber(distance_s - distance_t), axis=-1) / batch.count
    of_triples = jnp.sum(_huber(angle_s - angle_t), axis=(-2, -1)) / batch.count**2
    return keep(jnp.asarray(distance) * of_pairs + jnp.asarray(angle) * of_triples, mask)


def sp(
    student_feature: Feature,
    teacher_feature: Array,
    *,
    axis_name: str | None = None,
    where: Mask = None,
) -> Values:
    """Similarity-preserving distillation: rows of the batch's Gram matrix.

    With f the flattened feature, G = f f^T, and each row of G divided by its Euclidean norm:

        L_i = 1/batch sum_j (G_ij^student - G_ij^teacher)^2

    Args:
        student_feature: [batch, ...]; the net that learns. The paper takes the last feature map.
        teacher_feature: [batch, ...], any size; no gradient flows into it.
        axis_name: mapped axis over whose devices the batch is distributed.
        where: [batch] mask; examples where it is 0 or False are in no pair and give 0.

    Returns:
        [batch], float32 or wider; 0 where the normalised rows agree, so also for a batch of 1. The
        authors weight it by 3000.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(4), jnp.ones((4, 2)).cumsum(0)
        >>> print(qk.losses.sp(student, teacher))
        [0.409 0.317 0.226 0.135]

    Note:
        torchdistill 1.1.5 normalises the rows by their L1 norm; the paper and this by their L2
        norm.

    Reference:
        Tung, Mori, 2019, arXiv 1907.09682.
    """
    batch, mask = _gather(student_feature, teacher_feature, where, axis_name)
    # Rows that are masked out are 0 in both nets, so their products are 0 and cancel.
    gram_s = unit(inner(batch.student, batch.all_student))
    gram_t = unit(inner(batch.teacher, batch.all_teacher))
    return keep(jnp.sum(jnp.square(gram_s - gram_t), axis=-1) / batch.count, mask)


def pkt(
    student_feature: Feature,
    teacher_feature: Array,
    *,
    axis_name: str | None = None,
    where: Mask = None,
) -> Values:
    """Probabilistic knowledge transfer: divergence of each example's distribution over the others.

    With c_ij the cosine of f_i and f_j, and q_ij = (c_ij + 1) / sum_k (c_ik + 1), e = 1e-7:

        L_i = 1/batch sum_j q_ij^teacher log((q_ij^teacher + e) / (q_ij^student + e))

    Args:
        student_feature: f, [batch, ...]; the net that learns.
        teacher_feature: [batch, ...], any size; no gradient flows into it.
        axis_name: mapped axis over whose devices the batch is distributed.
        where: [batch] mask; examples where it is 0 or False are in no pair and give 0.

    Returns:
        [batch], float32 or wider; 0 where all cosines agree, so also for a batch of 1. The division
        by the batch is the authors' code's, which explains their weight of 30000.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(4), jnp.ones((4, 2)).cumsum(0)
        >>> print(qk.losses.pkt(student, teacher))
        [0.012 0.012 0.012 0.012]

    Note:
        The cosine divides by |f| + 1e-7, as the authors' code does. Their code's distribution of
        example i includes i itself; the paper's sums leave it out.

    Reference:
        Passalis, Tefas, 2018, arXiv 1803.10837.
    """
    batch, mask = _gather(student_feature, teacher_feature, where, axis_name)
    pairs, eps = batch.pairs(), 1e-7

    def affinities(own: Array, everyone: Array) -> Array:
        own, everyone = (x / (safe_norm(x, keepdims=True) + eps) for x in (own, everyone))
        q = jnp.where(pairs, (inner(own, everyone) + 1) / 2, 0)
        mass = jnp.sum(q, axis=-1, keepdims=True)
        return q / jnp.where(mass > 0, mass, 1)

    q_s = affinities(batch.student, batch.all_student)
    q_t = affinities(batch.teacher, batch.all_teacher)
    # -log((q_s + e) / (q_t + e)) = -log1p(x), whose summands nearly cancel. Since q_s and q_t have
    # the same sum, adding q_t x - (q_s - q_t) + e x = 0 leaves summands of one sign.
    x = (q_s - q_t) / (q_t + eps)
    return keep(jnp.sum(q_t * (x - jnp.log1p(x)) + eps * x, axis=-1) / batch.count, mask)


def cc(
    student_feature: Feature,
    teacher_feature: Array,
    *,
    gamma: Scalar = 0.4,
    order: int = 2,
    axis_name: str | None = None,
    where: Mask = None,
) -> Values:
    """Correlation congruence: a Gaussian kernel between examples, as a Taylor polynomial.

    With f of unit length, psi_ij = exp(-2 gamma) sum_(p <= order) (2 gamma)^p / p! (f_i . f_j)^p:

        L_i = 1/batch sum_j (psi_ij^student - psi_ij^teacher)^2

    Args:
        student_feature: [batch, ...]; the net that learns.
        teacher_feature: [batch, ...], any size; no gradient flows into it.
        gamma: width of the kernel, >= 0.
        order: P, degree of the polynomial, at least 1.
        axis_name: mapped axis over whose devices the batch is distributed.
        where: [batch] mask; examples where it is 0 or False are in no pair and give 0.

    Returns:
        [batch], float32 or wider; 0 where the kernels agree.

    Raises:
        ValueError: for shapes that do not fit, a negative gamma, or an order below 1.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(4), jnp.ones((4, 2)).cumsum(0)
        >>> print(qk.losses.cc(student, teacher))
        [0.19 0.19 0.19 0.19]

    Note:
        The features are brought to unit length, as the expansion asks for; torchdistill 1.1.5
        neither does that nor squares the difference. `cc_adjacent` is the loss of the authors'
        code, which is not the paper's.

    Reference:
        Peng et al., 2019, arXiv 1904.01802.
    """
    checks.number("gamma", gamma, low=0.0)
    checks.integer_in("order", order, 1)
    batch, mask = _gather(student_feature, teacher_feature, where, axis_name)
    g = jnp.asarray(gamma, batch.student.dtype)

    def kernel(own: Array, everyone: Array) -> Array:
        cosine = inner(unit(own), unit(everyone))
        # The constant summand, p = 0, is the same in both nets.
        terms = [(2 * g) ** p / math.factorial(p) * cosine**p for p in range(1, order + 1)]
        return jnp.exp(-2 * g) * sum(terms)

    gap = kernel(batch.student, batch.all_student) - kernel(batch.teacher, batch.all_teacher)
    return keep(jnp.sum(jnp.square(gap), axis=-1) / batch.count, mask)


def cc_adjacent(
    student_embedding: Feature,
    teacher_embedding: Array,
    *,
    axis_name: str | None = None,
    where: Mask = None,
) -> Values:
    """Products of neighbouring examples' distances: the loss of correlation congruence's code.

    With d_i = |e_i^student - e_i^teacher|, element by element, and j the next example of the batch:

        L_i = batch / (batch - 1) sum_c d_ic d_jc        (0 for the last example)

    Args:
        student_embedding: e, [batch, dim].
        teacher_embedding: [batch, dim]; the gradient flows into both embeddings.
        axis_name: mapped axis over whose devices the batch is distributed.
        where: [batch] mask; examples where it is 0 or False are skipped and give 0.

    Returns:
        [batch], float32 or wider; 0 for a batch of 1. Its mean is that over the batch - 1
        neighbours; the authors weight it by 0.02 and learn one linear layer of 128 outputs on
        either net.

    Raises:
        ValueError: for shapes that differ.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.cc_adjacent(jnp.eye(4), jnp.ones((4, 4))))
        [2.667 2.667 2.667 0.   ]

    Note:
        This depends on the order of the batch, and is not the loss of the paper: that is `cc`.

    Reference:
        The code published for Peng et al., 2019, arXiv 1904.01802.
    """
    names = ("student_embedding", "teacher_embedding")
    student, teacher, mask = prepare_features(
        student_embedding, teacher_embedding, where, names=names, detach=False
    )
    batch = gather_batch(student, teacher, mask, axis_name)
    gap = jnp.abs(batch.student - batch.teacher)
    everyone = gathered(gap, axis_name)
    size = everyone.shape[0]
    position = jnp.where(batch.all_kept, jnp.arange(size), size)
    # following[i]: where the first kept example behind i stands; `size` if there is none.
    following = jnp.append(jax.lax.cummin(position, reverse=True)[1:], size)[batch.position]
    neighbour = jnp.take(everyone, following, axis=0, mode="fill", fill_value=0)
    share = jnp.sum(gap * neighbour, axis=-1) * batch.count / jnp.maximum(batch.count - 1, 1)
    return keep(share, mask)


def irg(
    student_logits: Logits,
    teacher_logits: Array,
    student_features: Arrays,
    teacher_features: Arrays,
    *,
    vertex: Scalar = 0.1,
    edge: Scalar = 5.0,
    transformation: Scalar = 5.0,
    axis_name: str | None = None,
    where: Mask = None,
) -> Values:
    """Instance relationship graphs: vertices, edges, and how a layer changes both.

    With z the logits of K classes, E_ij = |f_i - f_j|^2 over its largest value in the batch, for
    each feature, and D_i = |F_i - H_i|^2 over its largest value, for each pair of consecutive maps
    F, H of one net:

        L_i = vertex 1/K sum_k (z_ik^student - z_ik^teacher)^2
            + edge mean_features 1/batch sum_j (E_ij^student - E_ij^teacher)^2
            + transformation mean_pairs (D_i^student - D_i^teacher)^2

    Args:
        student_logits: z, [batch, classes]; the net that learns.
        teacher_logits: [batch, classes]; no gradient flows into it.
        student_features: tuple of maps and vectors, shallow to deep; for example two maps and the
            pooled vector.
        teacher_features: as many, of any size; no gradient flows into them.
        vertex: weight of the first term, >= 0.
        edge: weight of the second term, >= 0.
        transformation: weight of the third term, >= 0.
        axis_name: mapped axis over whose devices the batch is distributed.
        where: [batch] mask; examples where it is 0 or False are in no pair and give 0.

    Returns:
        [batch], float32 or wider; 0 where logits agree and distances do up to a factor.

    Raises:
        ValueError: for shapes that do not fit, or negative weights.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(4), jnp.ones((4, 2)).cumsum(0)
        >>> print(qk.losses.irg(student, 2 * student, (student,), (teacher,)))
        [1.398 2.386 2.386 1.398]

    Note:
        The authors' code is for Caffe; weights, squares and the normalisation by the maximum are
        those of a PyTorch re-implementation. To subtract two maps, the larger is pooled to the
        other's size, and so are its channels: neighbouring ones are averaged.

    Reference:
        Liu et al., CVPR 2019, "Knowledge distillation via instance relationship graph".
    """
    weights = {"vertex": vertex, "edge": edge, "transformation": transformation}
    for name, value in weights.items():
        checks.number(name, value, low=0.0)
    z_s, z_t, mask = prepare_pair(student_logits, teacher_logits, where)
    pairs, _ = prepare_feature_lists(student_features, teacher_features, where, alike="examples")
    if pairs[0][0].shape[0] != z_s.shape[0]:
        raise ValueError(
            f"student_features[0] has shape {tuple(pairs[0][0].shape)} and student_logits "
            f"{tuple(z_s.shape)}; they must hold the same examples."
        )
    dtype = z_s.dtype
    edges, changes = [], []
    for student, teacher in pairs:
        batch = gather_batch(student, teacher, mask, axis_name)

        def edges_of(own: Array, everyone: Array, batch: GatheredBatch = batch) -> Array:
            # Distances do not know of the origin: products of centred rows lose fewer digits.
            mean = jnp.sum(everyone, axis=0, keepdims=True) / batch.count
            own, everyone = own - mean, everyone - mean
            lengths = [jnp.sum(jnp.square(x), axis=-1) for x in (own, everyone)]
            square = lengths[0][:, None] + lengths[1][None, :] - 2 * inner(own, everyone)
            kept = batch.pairs() & ~batch.itself()
            return _over_largest(jnp.where(kept, jnp.maximum(square, 0), 0), axis_name)

        gap = edges_of(batch.student, batch.all_student) - edges_of(
            batch.teacher, batch.all_teacher
        )
        edges.append(jnp.sum(jnp.square(gap), axis=-1) / batch.count)
    maps = [pair for pair in pairs if pair[0].ndim == 4 and pair[1].ndim == 4]
    for first, second in itertools.pairwise(maps):
        change_s, change_t = (
            _over_largest(keep(_change(f, s), mask), axis_name)
            for f, s in zip(first, second, strict=True)
        )
        changes.append(jnp.square(change_s - change_t))
    total_loss = jnp.asarray(vertex, dtype) * jnp.mean(jnp.square(z_s - z_t), axis=-1)
    total_loss += jnp.asarray(edge, dtype) * jnp.mean(jnp.stack(edges), axis=0)
    if changes:
        total_loss += jnp.asarray(transformation, dtype) * jnp.mean(jnp.stack(changes), axis=0)
    return keep(total_loss, mask)


def _over_largest(x: Array, axis_name: str | None) -> Array:
    largest = jnp.max(gathered(jnp.max(x, initial=0)[None], axis_name))
    return x / jnp.where(largest > 0, largest, 1)


def _change(first: Array, second: Array) -> Array:
    """Squared distance of each example's two maps, the larger pooled in size and channels."""
    first, second = pooled_alike(first, second)
    channels = min(first.shape[-1], second.shape[-1])
    gap = adaptive_mean(first, 3, channels) - adaptive_mean(second, 3, channels)
    return jnp.sum(jnp.square(gap), axis=(1, 2, 3))


def _gather(
    student: Array, teacher: Array, where: Mask, axis_name: str | None
) -> tuple[GatheredBatch, Kept]:
    student, teacher, mask = prepare_features(student, teacher, where, alike="examples")
    return gather_batch(student, teacher, mask, axis_name), mask


def _huber(x: Array) -> Array:
    size = jnp.abs(x)
    return jnp.where(size < 1, 0.5 * jnp.square(x), size - 0.5)
