"""Fixed point against floating point at equal bits: which format wears which data best.

    python examples/number_formats.py --out=number_formats.png

Three rows of pictures, a column each for 8, 6 and 4 bits:

1. the positive values of every format, its highest put at 1: the span is the dynamic range;
2. signal-to-quantization-noise ratio (SQNR) of Gaussian data as they get small, the scale fixed;
3. SQNR on data of different tails, and on the weights and input activations of a trained layer.

For row 3 every format gets the scale that suits it best on these very data: the format's highest
value is put at max|x| / 2^(k/8), k = 0 ... 40, and the k of the least squared error is taken. All
formats choose from the same 41 clipping levels, the largest of which clips nothing. Activations
behind a ReLU have no sign: fixed point spends the free bit on precision there, as integer hardware
does, while the small floats always carry their sign bit.

It trains a small MLP on the embedded digits for the layer (seconds on a laptop's CPU).
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qkd_jax import data, losses
from qkd_jax.models import create
from qkd_jax.numerics import FLOAT_FORMATS, FixedPointFormat

FLOATS = {8: ("e4m3fn", "e5m2"), 6: ("e2m3", "e3m2"), 4: ("e2m1",)}
CLIPPING = 2.0 ** (-np.arange(41) / 8)  # of max|x|
# Colours that colour-blind readers tell apart (Okabe and Ito); the marker says the same.
STYLES = {
    "fixed": ("#0072B2", "o"),
    "e4m3fn": ("#D55E00", "s"),
    "e5m2": ("#009E73", "^"),
    "e2m3": ("#D55E00", "s"),
    "e3m2": ("#009E73", "^"),
    "e2m1": ("#D55E00", "s"),
}


def formats(bits, *, signed=True):
    """{name: format} of a width; the fixed point's values lie in [-1, 1), or [0, 1)."""
    fixed = FixedPointFormat(0, bits - int(signed), signed)
    return {"fixed": fixed, **{name: FLOAT_FORMATS[name] for name in FLOATS[bits]}}


@functools.partial(jax.jit, static_argnums=0)
def cast(format, x):
    """The nearest values of a format."""
    return format.fake_cast(x)


def sqnr(x, format, highest):
    """10 log10(sum x^2 / sum (x - x_hat)^2) in dB, the format's highest value at `highest`."""
    scale = highest / format.max
    error = x - scale * np.asarray(cast(format, jnp.asarray(x / scale, jnp.float32)))
    return 10 * np.log10(np.sum(np.square(x)) / np.sum(np.square(error)))


def best_sqnr(x, format):
    """The SQNR at the best of the clipping levels."""
    return max(sqnr(x, format, level * np.max(np.abs(x))) for level in CLIPPING)


def drawn(samples, seed=0):
    """{name: data} of distributions with ever heavier tails."""
    rng = np.random.default_rng(seed)
    return {
        "uniform": rng.uniform(-1, 1, samples),
        "Gaussian": rng.normal(size=samples),
        "Laplace": rng.laplace(size=samples),
        "Student t (3)": rng.standard_t(3, samples),
    }


def trained_layer(steps, seed=0):
    """An MLP trained on the digits: (weights of dense2, its input activations, test accuracy)."""
    digits = data.load("digits", seed=seed)
    images, labels = digits.normalize(digits.train_images), digits.train_labels
    model = create("mlp", digits.num_classes, hidden=(64, 64))
    params = model.init(jax.random.key(seed), images[:1])["params"]
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, state, rows):
        def loss(params):
            logits = model.apply({"params": params}, jnp.asarray(images)[rows])
            return jnp.mean(losses.ce(logits, jnp.asarray(labels)[rows]))

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        params, state = step(params, state, rng.integers(0, len(images), 64))
    test = digits.normalize(digits.test_images)
    logits, kept = model.apply({"params": params}, test, mutable=["features"])
    activations = jax.tree.leaves(kept["features"]["hidden1"])[0]
    accuracy = np.mean(np.argmax(logits, -1) == digits.test_labels)
    return np.ravel(params["dense2"]["kernel"]), np.ravel(activations), accuracy


def compare(datasets, bits):
    """{data set: {format: SQNR in dB at its best scale}}."""
    return {
        name: {
            label: best_sqnr(np.asarray(x, np.float64), format)
            for label, format in formats(bits, signed=np.min(x) < 0).items()
        }
        for name, x in datasets.items()
    }


def label_of(name, bits):
    return f"fixed point, {bits} bits" if name == "fixed" else f"float {name}"


def say(tables, accuracy):
    """Prints the ranges, every SQNR with its winner, and who wins where."""
    print("Dynamic range: highest over smallest positive value")
    for bits in tables:
        for name, format in formats(bits).items():
            ratio = format.max / format.smallest
            print(f"  {bits} bits  {name:7} {ratio:9,.0f}  {20 * np.log10(ratio):6.1f} dB")
    print(f"\nBest SQNR in dB (the layer: dense2 of an MLP, {100 * accuracy:.1f} % on test digits)")
    for bits, table in tables.items():
        names = list(formats(bits))
        print(f"  {bits} bits{'':18}" + "".join(f"{name:>9}" for name in names) + "   winner")
        for data_set, found in table.items():
            first, second = sorted(found, key=found.get, reverse=True)[:2]
            lead = found[first] - found[second]
            row = "".join(f"{found[name]:9.1f}" for name in names)
            print(f"    {data_set:22}{row}   {first} by {lead:.1f} dB")
    for bits, table in tables.items():
        fixed = [d for d, found in table.items() if max(found, key=found.get) == "fixed"]
        other = [d for d in table if d not in fixed]
        print(f"\nAt {bits} bits fixed point wins on {', '.join(fixed) or 'nothing'};")
        print(f"floating point wins on {', '.join(other) or 'nothing'}.")


def draw_values(axis, bits):
    """The positive values of each format, relative to its highest."""
    kinds = formats(bits)
    for row, (name, format) in enumerate(kinds.items()):
        values = format.values()
        values = values[values > 0] / format.max
        color, _ = STYLES[name]
        y = len(kinds) - 1 - row
        axis.plot([values.min(), 1], [y, y], color=color, alpha=0.35, linewidth=1)
        axis.plot(values, np.full(len(values), y), "|", color=color, markersize=11)
        decibels = f"{20 * np.log10(1 / values.min()):.0f} dB"
        axis.annotate(
            f"{label_of(name, bits)}, {decibels}",
            (1, y),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right",
            color=color,
            fontsize=9.5,
        )
    axis.set_xscale("log", base=2)
    axis.set_xlim(2.0**-34, 2)
    axis.set_ylim(-0.6, 2.8)
    axis.set_yticks([])
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("value over the format's highest")
    axis.set_title(f"{bits} bits: the values and their dynamic range", loc="left")


def draw_levels(axis, bits, samples):
    """SQNR of Gaussian data against their level below full scale."""
    x = np.random.default_rng(1).normal(size=samples)
    levels = np.arange(0, 97, 3.0)
    for name, format in formats(bits).items():
        color, marker = STYLES[name]
        # The level is that of the standard deviation; full scale is the format's highest value.
        found = [sqnr(x, format, 10 ** (level / 20)) for level in levels]
        axis.plot(levels, found, color=color, marker=marker, markersize=3.5)
    axis.axhline(0, color="#9ca3af", linewidth=0.8)
    axis.set_xlim(0, 96)
    axis.set_ylim(-2, 45)
    axis.set_xlabel("standard deviation below full scale, dB")
    axis.set_ylabel("SQNR, dB")
    axis.set_title(f"{bits} bits: Gaussian data getting small", loc="left")


def draw_data(axis, bits, table, *, first):
    """SQNR at the best scale, data set by data set."""
    kinds = list(formats(bits))
    for place, name in enumerate(kinds):
        color, marker = STYLES[name]
        shift = 0.16 * (place - (len(kinds) - 1) / 2)
        rows = np.arange(len(table))[::-1] - shift
        found = [values[name] for values in table.values()]
        axis.hlines(rows, 0, found, color=color, alpha=0.35, linewidth=1)
        axis.plot(found, rows, marker, color=color, markersize=6, label=label_of(name, bits))
    axis.set_yticks(np.arange(len(table))[::-1], list(table) if first else [""] * len(table))
    axis.set_xlim(0, 52)
    axis.set_ylim(-0.6, len(table) - 0.4)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("SQNR, dB")
    axis.set_title(f"{bits} bits: each format at its best scale", loc="left")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9)


def draw(tables, samples, path):
    figure = Figure(figsize=(14, 11), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(tables), height_ratios=(0.8, 1, 1.1))
    for column, (bits, table) in enumerate(tables.items()):
        draw_values(axes[0, column], bits)
        draw_levels(axes[1, column], bits, samples)
        draw_data(axes[2, column], bits, table, first=column == 0)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e5e7eb", linewidth=0.7)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=110)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="number_formats.png", help="the picture to write")
    parser.add_argument("--samples", type=int, default=200_000, help="of each distribution")
    parser.add_argument("--steps", type=int, default=400, help="of training the MLP")
    given = parser.parse_args(args)
    weights, activations, accuracy = trained_layer(given.steps)
    datasets = {
        **drawn(given.samples),
        "trained weights": weights,
        "activations (ReLU)": activations,
    }
    tables = {bits: compare(datasets, bits) for bits in FLOATS}
    say(tables, accuracy)
    draw(tables, given.samples, given.out)
    print(f"\n{given.out} written")
    return tables


if __name__ == "__main__":
    main()
