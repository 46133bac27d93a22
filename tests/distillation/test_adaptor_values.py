"""What adaptors compute, against their definitions written out in NumPy at float64.

Weights, statistics and features are random; the restatements know names and shapes of parameters,
and nothing of how the modules are made.
"""

import jax
import numpy as np
import pytest

from qkd_jax.distillation import adaptors
from qkd_jax.training.state import jit_once

ROWS = 2


def conv(x, kernel, *, pad=0, stride=1, bias=0.0):
    """A correlation of [batch, h, w, in] with [kh, kw, in, out], zeros around."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    kh, kw = kernel.shape[:2]
    height, width = ((x.shape[a] - k) // stride + 1 for a, k in ((1, kh), (2, kw)))
    out = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
            out[:, i, j] = np.tensordot(window, kernel, 3)
    return out + bias


def conv_transposed(x, kernel):
    """4x4 with stride 2: pixels two apart, two zeros around, then a correlation."""
    apart = np.zeros((x.shape[0], 2 * x.shape[1] - 1, 2 * x.shape[2] - 1, x.shape[3]))
    apart[:, ::2, ::2] = x
    return conv(apart, kernel, pad=2)


def nearest(x, height, width):
    """Pixel floor(i H / height), floor(j W / width)."""
    rows = [int(i * x.shape[1] / height + 1e-9) for i in range(height)]
    columns = [int(j * x.shape[2] / width + 1e-9) for j in range(width)]
    return x[:, rows][:, :, columns]


def pooled(x, height, width):
    """Means over rows floor(i H / height) to ceil((i + 1) H / height) - 1, columns likewise."""
    out = np.zeros((x.shape[0], height, width, x.shape[3]))
    for i in range(height):
        for j in range(width):
            top, bottom = int(np.floor(i * x.shape[1] / height)), (i + 1) * x.shape[1] / height
            left, right = int(np.floor(j * x.shape[2] / width)), (j + 1) * x.shape[2] / width
            window = x[:, top : int(np.ceil(bottom)), left : int(np.ceil(right))]
            out[:, i, j] = window.mean((1, 2))
    return out


def relu(x):
    return np.where(x > 0, x, 0)


def leaky(x):
    return np.where(x > 0, x, 0.1 * x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Weights:
    """Parameters and statistics of a module by name."""

    def __init__(self, variables, *scope):
        self.params, self.stats = (dict(variables.get(c, {})) for c in ("params", "batch_stats"))
        for name in scope:
            self.params, self.stats = self.params[name], self.stats.get(name, {})

    def kernel(self, name):
        return self.params[name]["kernel"]

    def bias(self, name):
        return self.params[name]["bias"]

    def norm(self, name, x):
        p, s = self.params[name], self.stats[name]
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    def dense(self, name, x):
        return x @ self.kernel(name) + self.bias(name)


def reviewkd(w, students, teachers):
    below, adapted = None, []
    for i in (2, 1, 0):
        x = students[i] if students[i].ndim == 4 else students[i][:, None, None]
        x = w.norm(f"in{i}_bn", conv(x, w.kernel(f"in{i}")))
        if below is not None:
            y = nearest(below, *x.shape[1:3])
            both = np.concatenate([x, y], -1)
            gates = sigmoid(conv(both, w.kernel(f"gates{i}"), bias=w.bias(f"gates{i}")))
            x = gates[..., 0:1] * x + gates[..., 1:2] * y
        below = x
        out = w.norm(f"out{i}_bn", conv(x, w.kernel(f"out{i}"), pad=1))
        height, width = teachers[i].shape[1:3] if teachers[i].ndim == 4 else (1, 1)
        if out.shape[1] < height:
            out = nearest(out, height, width)
        adapted.insert(0, pooled(out, height, width))
    return {"student_features": adapted}


def semckd(w, students, teachers):
    def asked(name, x):
        vector = relu(w.dense(f"{name}_1", x.mean((1, 2))))
        vector = w.dense(f"{name}_2", vector)
        return vector / np.linalg.norm(vector, axis=-1, keepdims=True)

    rows = []
    for i, x in enumerate(students):
        row = []
        for j, teacher in enumerate(teachers):
            size = [min(a, b) for a, b in zip(x.shape[1:3], teacher.shape[1:3], strict=True)]
            y = pooled(x, *size)
            y = relu(w.norm(f"f{i}_{j}_bn1", conv(y, w.kernel(f"f{i}_{j}_1"))))
            y = relu(w.norm(f"f{i}_{j}_bn2", conv(y, w.kernel(f"f{i}_{j}_2"), pad=1)))
            row.append(conv(y, w.kernel(f"f{i}_{j}_3")))
        rows.append(row)
    queries = [asked(f"query{i}", x) for i, x in enumerate(students)]
    keys = [asked(f"key{j}", x) for j, x in enumerate(teachers)]
    scores = np.array([[np.sum(q * k, -1) for k in keys] for q in queries])
    attention = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return {"student_features": rows, "attention": np.moveaxis(attention, -1, 0)}


def connectors(w, students, teachers):
    return {
        "student_features": [
            w.norm(f"connector{i}_bn", conv(x, w.kernel(f"connector{i}")))
            for i, x in enumerate(students)
        ]
    }


def fsp(w, students, teachers):
    kernels = [w.kernel(f"connector{i}") for i in range(len(students))]
    return {"student_features": list(map(conv, students, kernels))}


def regressed(w, students, teachers):
    """Half as large by a stride, twice as large transposed, a little smaller by a valid kernel."""
    ways = (
        lambda x, k: conv(x, k, pad=1, stride=2),
        conv_transposed,
        conv,
        lambda x, k: conv(pooled(x, 2, 2), k),
    )
    return {
        "student_features": [
            w.norm(f"regressor{i}_bn", way(x, w.kernel(f"regressor{i}")))
            for i, (way, x) in enumerate(zip(ways, students, strict=True))
        ]
    }


def ft(w, students, teachers):
    size = [min(a, b) for a, b in zip(students[0].shape[1:3], teachers[0].shape[1:3], strict=True)]
    x = teacher = pooled(teachers[0], *size)
    paraphraser = Weights({"params": w.params}, "paraphraser")
    for i in range(3):
        kernel, bias = paraphraser.kernel(f"conv{i}"), paraphraser.bias(f"conv{i}")
        x = leaky(conv(x, kernel, pad=1, bias=bias))
    factor = x
    for i in range(3):
        x = leaky(conv(x, w.kernel(f"decoder{i}"), pad=1, bias=w.bias(f"decoder{i}")))
    error = 0.1 * np.mean((x - teacher) ** 2, axis=(1, 2, 3))
    translator = Weights({"params": w.params, "batch_stats": w.stats}, "translator")
    y = pooled(students[0], *size)
    for i in range(3):
        y = leaky(translator.norm(f"bn{i}", conv(y, translator.kernel(f"conv{i}"), pad=1)))
    assert factor.shape[-1] == 3 and y.shape == factor.shape
    return {"student_feature": y, "teacher_feature": factor, "adaptor_loss": error}


def vid(w, students, teachers):
    means = []
    for i, x in enumerate(students):
        first, second, third = (w.kernel(f"mean{i}_{layer}") for layer in range(3))
        means.append(conv(relu(conv(relu(conv(x, first)), second)), third))
    variances = [np.log1p(np.exp(w.params[f"variance{i}"])) + 1e-5 for i in range(len(students))]
    return {"student_features": means, "variances": variances}


def crd(w, students, teachers):
    return {
        "student_embedding": w.dense("student", students[0].mean((1, 2))),
        "teacher_embedding": w.dense("teacher", teachers[0]),
    }


TWO = ((5, 5, 3), (3, 4, 4)), ((4, 3, 2), (6, 5, 3))
# name of the loss: (features of the student, of the teacher, options, definition)
CASES = {
    # Sizes that are no multiples, larger and smaller than the teacher's; pooled vectors below.
    "reviewkd": (
        ((7, 5, 3), (4, 3, 4), (6,)),
        ((5, 3, 2), (6, 7, 4), (5,)),
        {"middle": 3},
        reviewkd,
    ),
    "semckd": (*TWO, {"dim": 4}, semckd),
    "ofd": (*TWO, {"margin": -0.5}, connectors),
    "ickd": (*TWO, {}, connectors),
    "fsp": (*TWO, {}, fsp),
    "ab": (
        ((6, 6, 3), (2, 3, 4), (5, 4, 2), (9, 9, 2)),
        ((3, 3, 2), (4, 6, 3), (3, 3, 4), (2, 2, 3)),
        {},
        regressed,
    ),
    "ft": (((5, 4, 4),), ((4, 6, 6),), {}, ft),
    "vid": (*TWO, {}, vid),
    "crd": (((3, 4, 3),), ((5,),), {"dim": 4}, crd),
}


@pytest.mark.parametrize("name", CASES)
def test_adaptors_compute_what_they_say(name):
    students, teachers, options, wanted = CASES[name]
    module = adaptors.build(name, students, teachers, **options)
    rng = np.random.default_rng(len(name))

    def draw(shapes):
        return tuple(rng.normal(size=(ROWS, *shape)).astype(np.float32) for shape in shapes)

    students, teachers = draw(students), draw(teachers)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), students, teachers))
    # Variances and scales above 0, all else around it.
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            rng.uniform(0.5, 2.0, leaf.shape)
            if path[-1].key in ("var", "scale")
            else rng.normal(size=leaf.shape)
        ).astype(np.float32),
        dict(shapes),
    )
    found = jit_once(lambda v: module.apply(v, students, teachers, train=False))(variables)
    wide = jax.tree.map(np.float64, (variables, students, teachers))
    scope = ("connectors",) if name == "ofd" else ()
    for key, value in wanted(Weights(wide[0], *scope), *wide[1:]).items():
        ours, theirs = jax.tree.leaves(found[key]), jax.tree.leaves(value)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            # Sums of a few dozen float32 products; the largest number of an array is the measure.
            atol = 2e-6 * np.abs(other).max()
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol, err_msg=key)


def test_regressors_of_hints_end_in_a_relu():
    shapes = ((3, 3, 3),), ((3, 3, 2),)
    given = tuple(
        np.random.default_rng(0).normal(size=(2, *s[0])).astype(np.float32) for s in shapes
    )
    hint, plain = adaptors.build("fitnet", *shapes), adaptors.build("ab", *shapes)
    variables = jit_once(hint.init)(jax.random.key(0), given[:1], given[1:])
    one, other = (
        m.apply(variables, given[:1], given[1:])["student_feature"] for m in (hint, plain)
    )
    assert np.any(other < 0)
    np.testing.assert_array_equal(one, relu(other))
