"""The contest example: against climbing and against the library's trees, and wrong input."""

import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from qkd_jax.hierarchy import ClassTree

PATH = pathlib.Path(__file__).parents[2] / "examples" / "nearest_common_ancestor.py"
spec = importlib.util.spec_from_file_location("nearest_common_ancestor", PATH)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def case(rng, count, reach):
    """(text of a case, its parents, its query)."""
    name = rng.permutation(count) + 1
    parents = {int(name[0]): None}
    for child in range(1, count):
        parents[int(name[child])] = int(name[rng.integers(max(0, child - reach), child)])
    edges = [(p, c) for c, p in parents.items() if p is not None]
    lines = [f"{edges[i][0]} {edges[i][1]}" for i in rng.permutation(len(edges))]
    a, b = rng.integers(1, count + 1, 2)
    return "\n".join([str(count), *lines, f"{a} {b}"]), parents, (int(a), int(b))


def climb(parents, a, b):
    line = lambda node: [] if node is None else [node, *line(parents[node])]
    above = set(line(a))
    return next(node for node in line(b) if node in above)


def test_random_cases():
    rng = np.random.default_rng(0)
    cases = [case(rng, int(rng.integers(1, 40)), int(rng.integers(1, 40))) for _ in range(60)]
    text = "\n".join([str(len(cases)), *(c[0] for c in cases)])
    found = example.answers(text.encode())
    assert found == [climb(parents, *query) for _, parents, query in cases]
    for answer, (_, parents, query) in zip(found, cases, strict=True):
        tree = ClassTree.from_parents(parents)
        assert tree.names[tree.lca(*tree.index(list(query)))] == answer


def test_the_program_answers_and_does_not_start_jax():
    text = "2\n16\n1 14\n8 5\n10 16\n5 9\n4 6\n8 4\n4 10\n1 13\n6 15\n10 11\n6 7\n10 2\n16 3\n8 1\n"
    text += "16 12\n16 7\n5\n2 3\n3 4\n3 1\n1 5\n3 5\n"  # the classic sample: 4 and 3
    code = f"import runpy, sys\ntry:\n    runpy.run_path({str(PATH)!r}, run_name='__main__')\n"
    code += "finally:\n    assert 'jax' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n3\n", "")
    done = subprocess.run(
        [sys.executable, PATH], input="1\n2\n1 x\n1 2\n", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: line 3: 'x' is not a whole number of at most 17 digits.\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the input is empty"),
        ("-1", "line 1: the number of cases is -1"),
        ("1\n0\n", "line 2: case 1 has 0 nodes"),
        ("1\n3\n1 2\n", "line 3: the input ends here, an edge of case 1 is missing"),
        ("1\n2\n1 2\n", "line 3: the input ends here, the query of case 1 is missing"),
        ("2\n1\n1 1\n", "line 3: the input ends here, the number of nodes of case 2"),
        ("1\n2\n\n1 3\n1 2\n", "line 4: node 3 of case 1 is not one of 1 to 2"),
        ("1\n2\n1 2\n1 0\n", "line 4: node 0 of case 1"),
        ("1\n3\n1 3\n2 3\n1 2\n", "line 4: node 3 of case 1 gets a second parent"),
        ("1\n4\n2 3\n3 4\n4 2\n1 2\n", "line [345]: node [234] of case 1 is its own ancestor"),
        ("1\n2\n1 1\n1 2\n", "line 3: node 1 of case 1 is its own ancestor"),
        ("1\n1\n1 1\n7\n", "line 4: 1 cases were announced, and there is more"),
        ("1\n2\n1 2.0\n1 2\n", "line 3: '2.0' is not a whole number"),
        ("1\n2\n1 1-2\n1 2\n", "line 3: '1-2' is not"),
        ("1\n2\n1 x2\n1 2\n", "line 3: 'x2' is not a whole number of at most 17 digits"),
        ("1\n2\n1 #2\n1 2\n", "line 3: '#2' is not"),
        ("1\n4\n1 2\n1\n1 4\n2 3\n", "line 4: it has 1 numbers, and 2 belong here"),
        ("2\n2\n1 2\n1 2\n2 2\n1 2\n1 2\n", "line 5: it has 2 numbers, and 1 belong here"),
        ("1\n2\n1 1_0\n1 2\n", "line 3: '1_0' is not"),
        ("1\n2\n1 -\n1 2\n", "line 3: '-' is not"),
        ("1\n2\n1 " + 30 * "9" + "\n1 2\n", "line 3: '9999"),
    ],
)
def test_wrong_input_is_named_by_its_line(text, message):
    with pytest.raises(example.InputError, match=message):
        example.answers(text.encode())
