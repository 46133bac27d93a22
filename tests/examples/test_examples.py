"""Every example runs, in small, and says what it should."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def number_formats():
    return load("number_formats")


@pytest.mark.slow
def test_number_formats_compares_and_draws(number_formats, tmp_path, capsys):
    out = tmp_path / "formats.png"
    tables = number_formats.main([f"--out={out}", "--samples=4000", "--steps=60"])
    assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 20_000
    said = capsys.readouterr().out
    assert "e4m3fn    229,376   107.2 dB" in said  # 448 / 2^-9
    assert "4 bits  fixed           7    16.9 dB" in said
    assert set(tables) == {8, 6, 4}
    for bits, table in tables.items():
        leads = []
        for name in ("uniform", "Gaussian", "Laplace", "Student t (3)"):
            fixed, *floats = table[name].values()
            leads.append(fixed - max(floats))
        # Without a tail equal steps are best; the heavier it is, the more do small floats gain.
        assert leads == sorted(leads, reverse=True) and leads[0] > 3
        assert leads[-1] < (0 if bits < 8 else leads[0] - 10)
        assert "trained weights" in table and f"At {bits} bits fixed point wins on uniform" in said
        assert all(value > 5 for row in table.values() for value in row.values())


@pytest.mark.slow
def test_number_formats_against_the_textbook(number_formats):
    x = number_formats.drawn(100_000)
    fixed = number_formats.formats(8)["fixed"]
    # Uniform data over the whole grid: noise step^2 / 12, so 20 log10(2) dB a bit.
    wanted = 10 * np.log10((1 / 3) / ((1 / 127) ** 2 / 12))
    assert number_formats.sqnr(x["uniform"], fixed, 1.0) == pytest.approx(wanted, abs=0.1)
    assert number_formats.best_sqnr(x["uniform"], fixed) == pytest.approx(wanted, abs=0.1)
    # Max's optimal uniform quantizer of 16 levels leaves 0.01154 of a Gaussian's power (Max, 1960);
    # two's complement is one level off its symmetric grid.
    four = number_formats.best_sqnr(x["Gaussian"], number_formats.formats(4)["fixed"])
    assert four == pytest.approx(-10 * np.log10(0.01154), abs=0.5)
