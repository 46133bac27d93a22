"""Each public loss, quantizer, observer and PTQ method shows a short example, and it runs."""

from __future__ import annotations

import doctest
import inspect
import re

import pytest

import qkd_jax as qk
from qkd_jax.observers import OBSERVERS

# {kind: {name: function whose docstring has the example}}
METHODS = {name: getattr(qk.ptq, name) for name in qk.ptq.__all__}
KINDS = {
    "loss": qk.LOSSES,
    "method": METHODS,
    "quantizer": {name: module.fake_quant for name, module in qk.QUANTIZERS.items()},
    "observer": {name: module.range for name, module in OBSERVERS.items()},
}
ENTRIES = {f"{kind} {name}": f for kind, entries in KINDS.items() for name, f in entries.items()}
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


class Rounded(doctest.OutputChecker):
    """Compares numbers to the decimals written: the last digits vary with the processor."""

    def check_output(self, want, got, optionflags):
        layouts = {re.sub(r"\s+", "", NUMBER.sub("#", text)) for text in (want, got)}
        pairs = zip(NUMBER.findall(want), NUMBER.findall(got), strict=False)
        return len(layouts) == 1 and all(
            abs(float(a) - float(b)) <= 1.001 * last_decimal(a) for a, b in pairs
        )


def last_decimal(number):
    """One in the last decimal of a written number; a rounding of float32 for a whole number."""
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals else 1e-5


def run(name, text):
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    lines = []
    doctest.DocTestRunner(checker=Rounded(), verbose=False).run(test, out=lines.append)
    return len(test.examples), "".join(lines)


@pytest.mark.parametrize("name", ENTRIES)
def test_example_runs(name):
    text = inspect.getdoc(ENTRIES[name]) or ""
    section = re.search(r"^Example:\n((?:    .*\n)+)", text + "\n", flags=re.M)
    assert section, "give the docstring an 'Example:' section with two lines of >>>"
    assert re.search(r">>> import .*\bqkd_jax as qk\b", section[1]), "let it stand for itself"
    count, failures = run(name, inspect.cleandoc(section[1]))
    assert count >= 2 and not failures, failures


def test_a_wrong_example_is_found():
    check = Rounded().check_output
    assert check("[1.26 3.]", "[1.2551 3.0000]", 0)
    for wrong in ("[1.28 3.]", "[1.26]", "[1.26 3. 4.]", "(1.26 3.)", "[1.26 4.0]"):
        assert not check("[1.26 3.]", wrong, 0)
    assert run("x", ">>> print(2 * 1.25)\n2.5\n") == (1, "")
    for wrong in ("2.7", "Array(2.5)", ""):
        assert "Expected" in run("x", f">>> print(2 * 1.25)\n{wrong}\n")[1]
