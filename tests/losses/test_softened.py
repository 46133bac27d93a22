"""Softened distributions keep their differences at any temperature; the truth has 80 digits."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import losses
from qkd_jax.losses.inputs.logits import standardized
from qkd_jax.losses.inputs.softened import divergence, log_mean_exp

CLASSES, BATCH = 7, 3
RNG = np.random.default_rng(0)
STUDENT, TEACHER, SECOND = (3 * RNG.normal(size=(3, BATCH, CLASSES))).astype(np.float32)
LABELS = jnp.arange(BATCH)
TEMPERATURES = (0.25, 1.0, 4.0, 20.0, 1e3, 1e4, 1e6)


def log_softmax(z):
    top = max(z)
    total = sum((x - top).exp() for x in z).ln() + top
    return [x - total for x in z]


def kl(log_p, log_q):
    return sum(p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True))


def without(z, y):
    return z[:y] + z[y + 1 :]


def kd(s, t, _, T):
    return T * T * kl(log_softmax([x / T for x in t[0]]), log_softmax([x / T for x in s]))


def kd_mean(s, t, _, T):
    each = [log_softmax([x / T for x in z]) for z in t]
    mean = [(sum(z[k].exp() for z in each) / len(each)).ln() for k in range(CLASSES)]
    return T * T * kl(mean, log_softmax([x / T for x in s]))


def kd_sum(s, t, y, T):
    return sum(kd(s, [z], y, T) for z in t)


def dkd(s, t, y, T, alpha=Decimal(1), beta=Decimal(8)):
    def both(z):
        p = log_softmax([x / T for x in z])
        return [p[y], sum(x.exp() for x in without(p, y)).ln()]

    others = lambda z: log_softmax([x / T for x in without(z, y)])
    return T * T * (alpha * kl(both(t[0]), both(s)) + beta * kl(others(t[0]), others(s)))


def nkd(s, t, y, T, gamma=Decimal("1.5")):
    own = lambda z: log_softmax(z)[y]
    q_t, q_s = (log_softmax([x / T for x in without(z, y)]) for z in (t[0], s))
    soft = -sum(p.exp() * q for p, q in zip(q_t, q_s, strict=True))
    return -own(t[0]).exp() * own(s) + gamma * T * T * soft


PAIRS = {
    "kd": (kd, lambda s, T: losses.kd(s, TEACHER, temperature=T)),
    "sqakd": (kd, lambda s, T: losses.sqakd(s, TEACHER, temperature=T)),
    "ctkd": (kd, lambda s, T: losses.ctkd(s, TEACHER, T)),
    "kd_mean": (kd_mean, lambda s, T: losses.kd_mean(s, (TEACHER, SECOND), temperature=T)),
    "kd_sum": (kd_sum, lambda s, T: losses.kd_sum(s, (TEACHER, SECOND), temperature=T)),
    "dkd": (dkd, lambda s, T: losses.dkd(s, TEACHER, LABELS, beta=8.0, temperature=T)),
    "nkd": (nkd, lambda s, T: losses.nkd(s, TEACHER, LABELS, temperature=T)),
}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_at_any_temperature(name, temperature):
    exact, loss = PAIRS[name]
    value, back = jax.vjp(lambda s: loss(s, temperature), STUDENT)
    (gradient,) = back(jnp.ones_like(value))
    with localcontext() as context:
        context.prec = 80
        T, h = Decimal(temperature), Decimal(10) ** -25
        for i in range(BATCH):
            s = [Decimal(float(x)) for x in STUDENT[i]]
            t = [[Decimal(float(x)) for x in z[i]] for z in (TEACHER, SECOND)]
            at = lambda k, step, s=s, t=t, i=i: exact(
                [x + step * (j == k) for j, x in enumerate(s)], t, i, T
            )
            np.testing.assert_allclose(value[i], float(at(-1, 0)), rtol=1e-6)
            slopes = np.array([float((at(k, h) - at(k, -h)) / (2 * h)) for k in range(CLASSES)])
            error = np.linalg.norm(gradient[i] - slopes) / np.linalg.norm(slopes)
            assert error < 1e-6, (name, temperature, error)


def test_a_learned_temperature_has_its_gradient_at_any_size():
    """d(T^2 KL)/dT, which tends to 0 as 1 / T^2, against differences of 80 digits."""
    for temperature in TEMPERATURES[1:5]:
        climb = jax.grad(lambda T: -losses.ctkd(STUDENT, TEACHER, T, reversal=1.0).sum())
        with localcontext() as context:
            context.prec = 80
            T, h = Decimal(temperature), Decimal(10) ** -25
            rows = [
                ([Decimal(float(x)) for x in a], [[Decimal(float(x)) for x in b]])
                for a, b in zip(STUDENT, TEACHER, strict=True)
            ]
            total = lambda T, rows=rows: sum(kd(s, t, 0, T) for s, t in rows)
            slope = float((total(T + h) - total(T - h)) / (2 * h))
            scale = float(abs(total(T)) / T)  # of its two parts, which cancel
        assert abs(float(climb(jnp.float32(temperature))) - slope) < 1e-5 * scale


def test_far_and_close_agree_where_they_meet():
    """Both sides of the border between the forms, against float64."""
    for size in (0.3, 0.45, 0.5, 0.55, 0.7, 2.0, 30.0):
        p, q = size * TEACHER / 3, size * STUDENT / 3
        log_p, log_q = (jax.nn.log_softmax(np.float64(z)) for z in (p, q))
        exact = np.sum(np.exp(log_p) * (np.float64(log_p) - np.float64(log_q)), axis=-1)
        np.testing.assert_allclose(divergence(p, q), exact, rtol=2e-5)
        mean = np.log(np.mean(np.exp(np.float64(p)), axis=-1))
        np.testing.assert_allclose(log_mean_exp(jnp.asarray(p)), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["kd", "lskd", "ctkd", "dkd", "nkd", "kd_mean", "mlkd"])
def test_classes_forbidden_in_both_nets(name):
    """As if they were not there: a logit of -inf in both nets, values and gradients."""
    forbidden = np.isin(np.arange(CLASSES), [4, 6])
    masked = lambda z: np.where(forbidden, -np.inf, z).astype(np.float32)
    calls = {
        "ctkd": lambda s, t: losses.ctkd(s, t, jnp.float32(4)),
        "dkd": lambda s, t: losses.dkd(s, t, LABELS),
        "nkd": lambda s, t: losses.nkd(s, t, LABELS),
        "kd_mean": lambda s, t: losses.kd_mean(s, (t, t)),
    }
    loss = calls.get(name, lambda s, t: losses.LOSSES[name](s, t))
    value, back = jax.vjp(lambda s: loss(s, masked(TEACHER)), masked(STUDENT))
    (gradient,) = back(jnp.ones_like(value))
    fewer, back = jax.vjp(lambda s: loss(s, TEACHER[:, ~forbidden]), STUDENT[:, ~forbidden])
    (slopes,) = back(jnp.ones_like(fewer))
    if name != "mlkd":  # whose third term looks at pairs of classes, and divides by their number
        np.testing.assert_allclose(value, fewer, rtol=1e-5)
        np.testing.assert_allclose(gradient[:, ~forbidden], slopes, rtol=1e-4, atol=1e-6)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    assert not gradient[:, forbidden].any()


def test_z_scores_leave_forbidden_classes_out():
    z = jnp.array([[1.0, 3.0, -jnp.inf, 5.0], [2.0, 2.0, -jnp.inf, 2.0]])
    np.testing.assert_allclose(
        standardized(z), [[-1, 0, -np.inf, 1], [0, 0, -np.inf, 0]], rtol=1e-6, atol=1e-6
    )
