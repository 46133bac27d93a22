"""Which control a name means."""

import pytest

from qkd_jax.report.control import find_control

ROWS = {
    "w4": [("teacher", "float"), ("alone", "labels"), ("student", "distilled")],
    "w2": [("teacher", "float"), ("alone", "labels"), ("student", "distilled again")],
}


def pairs(against, rows=ROWS):
    return {"/".join(a): "/".join(b) for a, b in find_control(rows, against).pairs}


def test_an_arm_is_the_control_of_the_same_nets():
    assert pairs("w4") == {
        "w2/teacher/float": "w4/teacher/float",
        "w2/alone/labels": "w4/alone/labels",
        "w2/student/distilled again": "w4/student/distilled",  # the net's only row
    }


@pytest.mark.parametrize("against", ["labels", "alone/labels", "alone: labels", "alone"])
def test_a_row_is_the_control_in_its_own_arm(against):
    assert pairs(against) == {
        f"{arm}/{net}/{method}": f"{arm}/alone/labels"
        for arm, keys in ROWS.items()
        for net, method in keys
        if net != "alone"
    }


def test_one_row_is_the_control_of_all():
    found = pairs("w2/alone/labels")
    assert len(found) == 5 and set(found.values()) == {"w2/alone/labels"}


def test_rows_without_a_control_are_listed():
    found = find_control(ROWS, "distilled")
    assert {arm for (arm, *_), _ in found.pairs} == {"w4"}
    assert found.without == tuple(("w2", *key) for key in ROWS["w2"])


@pytest.mark.parametrize(
    ("against", "rows", "message"),
    [
        ("label", ROWS, "Did you mean 'labels'"),
        ("float", {"a": [("x", "float"), ("y", "float")]}, "may be x/float, y/float"),
        ("a", {"a": [("x", "float")]}, "only arm; name a row in it: x/float"),
    ],
)
def test_names_that_say_too_little(against, rows, message):
    with pytest.raises(ValueError, match=message):
        find_control(rows, against)
