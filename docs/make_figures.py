"""Draws the figures of the concept pages with the library's own functions.

    python docs/make_figures.py            # or `make pages`; about a minute on two cores

Every curve is computed, none is sketched: the grids and gradients are those of the quantizers, the
nets of the last figures are trained here on the embedded digits. The files go to docs/figures/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

import qkd_jax as qk
from configs import qkd
from qkd_jax import data
from qkd_jax.models import create
from qkd_jax.numerics import stats

FOLDER = Path(__file__).resolve().parent / "figures"
# Colours that colour-blind readers tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#222222"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "qkd_jax",  # the same file at every run
}


def figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list]:
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(drawing)
    return drawing, list(np.atleast_1d(drawing.subplots(1, columns)))


def quantized(x: np.ndarray, spec: qk.Spec, fitted_to: np.ndarray | None = None) -> np.ndarray:
    """`x` on the grid that the spec's quantizer starts from on some data (default: `x`)."""
    module = qk.QUANTIZERS[spec.quantizer]
    values = jnp.asarray(x if fitted_to is None else fitted_to, jnp.float32)
    params = module.init(stats.finish(stats.measure(values)), spec)
    return np.asarray(module.fake_quant(jnp.asarray(x, jnp.float32), params, spec))


def number_formats() -> Figure:
    """The values that four bits can have, in five formats."""
    dense = np.linspace(-1, 1, 20001)
    rows = [
        ("integer", qk.Spec(bits=4, narrow_range=True)),
        ("integer, unsigned", qk.Spec(bits=4, signed=False)),
        ("powers of two, summed (apot)", qk.Spec(bits=4, quantizer="apot", observer="minmax")),
        ("float e2m1", qk.Spec(bits=4, quantizer="float")),
        ("normal quantiles (NF4)", qk.Spec(bits=4, quantizer="codebook")),
    ]
    drawing, (axes,) = figure(8, 2.6)
    for height, (_, spec) in enumerate(reversed(rows)):
        x = dense if spec.signed else dense[dense >= 0]
        levels = np.unique(quantized(x, spec))
        levels = levels / np.abs(levels).max()
        axes.hlines(height, -1, 1, color="#dddddd", lw=1)
        axes.plot(levels, np.full_like(levels, height), "|", color=BLUE, ms=16, mew=1.6)
        axes.annotate(f"{len(levels)} values", (1.04, height), va="center", color=BLACK)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set(xlim=(-1.05, 1.28), xlabel="value, the largest put at 1", ylim=(-0.6, len(rows) - 0.4))
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    return drawing


def clipping() -> Figure:
    """Error of rounding and of clipping, over the end of the grid, for Gaussian data."""
    x = np.random.default_rng(0).normal(size=200_000)
    ends = np.linspace(0.4, 5, 60)
    drawing, panels = figure(9, 3, 2)
    spec = qk.Spec(bits=3, observer="minmax")
    inside, outside, total = [], [], []
    for end in ends:
        error = np.square(x - quantized(x, spec, np.array([-end, end])))
        total.append(error.mean())
        outside.append(np.where(np.abs(x) > end, error, 0).mean())
        inside.append(total[-1] - outside[-1])
    axes = panels[0]
    axes.plot(ends, inside, color=BLUE, label="rounding")
    axes.plot(ends, outside, color=ORANGE, label="clipping")
    axes.plot(ends, total, color=BLACK, lw=2, label="both")
    best = int(np.argmin(total))
    axes.plot(ends[best], total[best], "o", color=BLACK)
    axes.set(title="3 bits", xlabel="end of the grid, in standard deviations", ylim=(0, 0.3))
    axes.set_ylabel("mean squared error")
    axes.legend(frameon=False)
    axes = panels[1]
    for bits, colour in ((2, PINK), (3, ORANGE), (4, GREEN), (8, BLUE)):
        spec = qk.Spec(bits=bits, observer="minmax")
        errors = [np.square(x - quantized(x, spec, np.array([-end, end]))).mean() for end in ends]
        best = int(np.argmin(errors))
        axes.semilogy(ends, errors, color=colour, label=f"{bits} bits")
        axes.plot(ends[best], errors[best], "o", color=colour)
    axes.set(title="the best end moves out with the bits", xlabel="end of the grid")
    axes.legend(frameon=False)
    return drawing


def straight_through() -> Figure:
    """A 2-bit staircase, and the two gradients of its backward pass."""
    spec = qk.Spec(bits=2, signed=False, quantizer="lsq")
    module, step = qk.QUANTIZERS["lsq"], jnp.float32(1.0)
    x = jnp.linspace(-1, 4.5, 1101)

    def value(x, step):
        return module.fake_quant(x, {"step": step}, spec)

    slope = jax.vmap(jax.grad(value), (0, None))(x, step)
    # LSQ scales the step's gradient by the number of elements and codes; with one element here.
    by_step = jax.vmap(jax.grad(value, argnums=1), (0, None))(x, step) * np.sqrt(spec.format.qmax)
    drawing, panels = figure(10, 2.9, 3)
    panels[0].plot(x, x, color="#bbbbbb", lw=1)
    panels[0].plot(x, jax.vmap(value, (0, None))(x, step), color=BLUE)
    panels[0].set(title="forward: $\\hat{x}$", ylabel="$\\hat{x}$", ylim=(-1.2, 4.2))
    panels[1].plot(x, slope, color=ORANGE)
    panels[1].set(title="backward: $d\\hat{x}/dx$ (straight-through)", ylim=(-0.2, 1.3))
    panels[2].plot(x, by_step, color=GREEN)
    panels[2].axhline(0, color="#bbbbbb", lw=1, zorder=0)
    panels[2].set(title="backward: $d\\hat{x}/ds$ (LSQ)")
    for axes in panels:
        axes.set_xlabel("x / s")
    return drawing


class Digits:
    """The embedded digits and a training loop of twenty lines for nets on them."""

    def __init__(self, steps: int):
        dataset = data.load("digits", seed=0)
        self.images = jnp.asarray(dataset.normalize(dataset.train_images))
        self.labels = jnp.asarray(dataset.train_labels)
        self.test = jnp.asarray(dataset.normalize(dataset.test_images))
        self.test_labels = np.asarray(dataset.test_labels)
        self.raw_test = np.asarray(dataset.test_images)
        self.model = create("mlp", dataset.num_classes, hidden=(64, 64))
        self.steps = steps

    def trainer(self, net, *, lr: float) -> Callable:
        """A function (variables, seed) -> variables after `steps` steps of Adam on the labels."""
        optimizer = optax.adam(lr)

        def loss(variables, rows):
            logits = net.apply(variables, self.images[rows])
            return jnp.mean(qk.losses.ce(logits, self.labels[rows]))

        @jax.jit
        def step(variables, state, rows):
            updates, state = optimizer.update(jax.grad(loss)(variables, rows), state)
            return optax.apply_updates(variables, updates), state

        def train(variables, seed: int):
            state, rng = optimizer.init(variables), np.random.default_rng(seed)
            for _ in range(self.steps):
                rows = rng.integers(0, len(self.images), 64)
                variables, state = step(variables, state, rows)
            return variables

        return train

    def float_nets(self, count: int) -> list:
        train = self.trainer(self.model, lr=2e-3)
        starts = [self.model.init(jax.random.key(seed), self.images[:1]) for seed in range(count)]
        return [train({"params": v["params"]}, seed) for seed, v in enumerate(starts)]

    def accuracy(self, net, variables) -> float:
        logits = jax.jit(net.apply)(variables, self.test)
        return 100 * float(np.mean(np.argmax(logits, -1) == self.test_labels))


def calibration_against_training(digits: Digits, seeds: int) -> Figure:
    """Top-1 after calibration alone and after training with the quantizers in place."""
    widths = (2, 3, 4, 8)
    table = np.zeros((seeds, len(widths), 2))
    floats = digits.float_nets(seeds)
    for column, bits in enumerate(widths):
        inputs = qk.Spec(bits=bits, quantizer="lsq", signed=False, observer="mse")
        weights = qk.Spec(bits=bits, quantizer="lsq", observer="mse")
        first = qk.Spec(bits=8, symmetric=False, signed=False)
        rules = [
            qk.Rule("dense1", weight=weights, input=first),
            qk.Rule(".*", weight=weights, input=inputs),
        ]
        net = qk.quantize(digits.model, rules)
        train = digits.trainer(net, lr=1e-3)
        for seed, floating in enumerate(floats):
            variables = qk.calibrate(net, floating, [digits.images])
            trained = train(variables, seed)
            table[seed, column] = [digits.accuracy(net, v) for v in (variables, trained)]
    drawing, (axes,) = figure(6, 3.2)
    level = np.mean([digits.accuracy(digits.model, v) for v in floats])
    axes.axhline(level, color="#888888", lw=1, ls="--", label="float")
    names = ("calibrated (PTQ)", "trained with quantizers (QAT)")
    for method, (name, colour) in enumerate(zip(names, (ORANGE, BLUE), strict=True)):
        mean, spread = table[..., method].mean(0), table[..., method].std(0, ddof=1)
        axes.errorbar(
            range(len(widths)), mean, spread, color=colour, marker="o", capsize=3, label=name
        )
    axes.set_xticks(range(len(widths)), [f"W{b}A{b}" for b in widths])
    axes.set(ylabel="top-1 on 1,497 test digits, %")
    axes.legend(frameon=False, loc="lower right")
    return drawing


def soft_labels(digits: Digits) -> Figure:
    """A teacher's answer on a test digit that it finds hard, at four temperatures."""
    logits = np.asarray(digits.model.apply(digits.float_nets(1)[0], digits.test))
    probabilities = np.asarray(jax.nn.softmax(logits))
    right = np.flatnonzero(probabilities.argmax(-1) == digits.test_labels)
    index = right[np.argmin(np.abs(probabilities[right].max(-1) - 0.8))]
    drawing, panels = figure(10, 2.6, 5)
    panels[0].imshow(digits.raw_test[index].squeeze(), cmap="gray_r")
    panels[0].set_title(f"label {digits.test_labels[index]}")
    panels[0].set_axis_off()
    for axes, temperature in zip(panels[1:], (1, 2, 4, 8), strict=True):
        axes.bar(range(10), jax.nn.softmax(logits[index] / temperature), color=BLUE)
        axes.set(title=f"T = {temperature}", ylim=(0, 1), xlabel="class")
        axes.set_xticks(range(10))
        axes.tick_params(labelsize=8)
    panels[1].set_ylabel("probability")
    return drawing


def phases() -> Figure:
    """Who learns from whom in the arms of configs/qkd.py, read from its table."""
    config = qkd.get_config()
    rows = [
        ("QAT alone", [("qat_only", "qat_only")]),
        ("QAT, fixed teacher", [("qat_fixed_teacher", "qat_fixed_teacher")]),
        ("QKD: student", [(s, "student") for s in ("self_study", "co_study", "tutor")]),
        ("QKD: teacher", [(s, "teacher") for s in ("self_study", "co_study", "tutor")]),
    ]
    drawing, (axes,) = figure(8.5, 2.4)
    total = config.stages.qat_only.epochs

    def sources_of(terms: dict) -> list[str]:
        return [term["source"] for term in terms.values() if term.get("source")]

    for height, (_, spans) in enumerate(reversed(rows)):
        start = 0.0
        for stage, net in spans:
            fields = config.stages[stage]
            width = 100 * fields.epochs / total
            terms = fields.learn[net] if net in fields.learn else {}
            sources = sources_of(terms)
            teaches = any(net in sources_of(other) for other in config.stages[stage].learn.values())
            words = "labels" + "".join(f" + {source}" for source in sources)
            words = words if terms else "frozen, teaches" if teaches else "not used"
            colour = "#eeeeee" if not terms else BLUE if not sources else ORANGE
            axes.barh(height, width, left=start, color=colour, edgecolor="white", height=0.8)
            axes.text(
                start + width / 2,
                height,
                words,
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if terms else BLACK,
            )
            start += width
    edges = np.cumsum([100 * config.stages[s].epochs / total for s in ("self_study", "co_study")])
    for edge in edges:
        axes.axvline(edge, color="#888888", lw=0.8, ls=":")
    names = ("self-studying", "co-studying", "tutoring")
    middles = (edges[0] / 2, edges.mean(), (edges[1] + 100) / 2)
    for name, middle in zip(names, middles, strict=True):
        axes.text(middle, len(rows) - 0.45, name, ha="center", va="bottom", fontsize=9)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set(xlim=(0, 100), xlabel="% of the student's steps", ylim=(-0.5, len(rows) - 0.1))
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    return drawing


def main(argv: list[str] | None = None) -> list[Path]:
    """Draws every figure; returns their files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each small net")
    parser.add_argument("--seeds", type=int, default=3, help="nets of the figure PTQ against QAT")
    flags = parser.parse_args(argv)
    digits = Digits(flags.steps)
    figures: dict[str, Callable[[], Figure]] = {
        "number_formats": number_formats,
        "clipping": clipping,
        "straight_through": straight_through,
        "ptq_qat": lambda: calibration_against_training(digits, flags.seeds),
        "soft_labels": lambda: soft_labels(digits),
        "phases": phases,
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in figures.items():
            written.append(flags.out / f"{name}.svg")
            draw().savefig(written[-1], metadata={"Date": None}, facecolor="white")
    return written


if __name__ == "__main__":
    main()
