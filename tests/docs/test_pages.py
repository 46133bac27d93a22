"""The pages say what the code is: generated parts are fresh, and every name and path exists."""

from __future__ import annotations

import importlib
import importlib.util
import re
import types
from pathlib import Path

import pytest

import qkd_jax as qk
from qkd_jax import data_free

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_pages() -> types.ModuleType:
    return script("make_pages")


def test_methods_are_those_of_the_tables(make_pages):
    assert make_pages.METHODS_PAGE.read_text() == make_pages.methods_page(), "run `make pages`"


def test_rooms_are_those_of_the_imports(make_pages):
    for page in make_pages.WITH_ROOMS:
        assert page.read_text() == make_pages.with_rooms(page), "run `make pages`"
    with pytest.raises(ValueError, match="0 places"):
        make_pages.filled("no markers", "rooms", "text")


def test_a_method_without_a_source_is_an_error(make_pages):
    def unsourced():
        """Does something."""

    unsourced.__module__ = "qkd_jax.trees"  # whose file names no paper
    with pytest.raises(ValueError, match=r"'unsourced'.* names no source.*arXiv <number>"):
        make_pages.method_rows({"unsourced": unsourced})
    unsourced.__doc__ = (
        "Does something (Somebody et al., 2019,\n\narXiv\n1234.56789, and CVPR 2017)."
    )
    (row,) = make_pages.method_rows({"unsourced": unsourced})
    assert row[2] == "[1234.56789](https://arxiv.org/abs/1234.56789), CVPR 2017"
    unsourced.__doc__ = None
    with pytest.raises(ValueError, match="no docstring"):
        make_pages.one_line("unsourced", unsourced)


def test_the_counts_of_the_readme():
    text = (ROOT / "README.md").read_text()
    methods = len(set(qk.ptq.__all__) - {"equalization_pairs"})
    for count, noun in (
        (len(qk.QUANTIZERS), "quantizers"),
        (len(qk.OBSERVERS), "observers"),
        (len(qk.LOSSES), "losses"),
        (methods, "post-training methods"),
    ):
        assert f"{count} {noun}" in text
    assert "two data-free generators" in " ".join(text.split()) and len(data_free.GENERATORS) == 2


@pytest.mark.parametrize("name", ["MODELS", "LOSSES", "QUANTIZERS", "OBSERVERS", "PRESETS"])
def test_the_tables_are_at_the_front_door(name):
    assert getattr(qk, name)


@pytest.mark.parametrize("name", ["qkd_jax", "ptq"])
def test_the_api_pages_have_every_public_name(name):
    module = qk if name == "qkd_jax" else getattr(qk, name)
    text = (ROOT / "docs" / "api" / f"{name}.md").read_text()
    for public in module.__all__:
        if isinstance(getattr(module, public), types.ModuleType) or public.isupper():
            assert f"`qk.{public}`" in text or f"`{public}`" in text, public
        else:
            assert re.search(rf"^::: \S+\.{public}$", text, flags=re.M), public


def test_the_api_page_of_losses_has_every_family():
    text = (ROOT / "docs" / "api" / "losses.md").read_text()
    for loss in qk.LOSSES.values():
        assert f"::: {loss.__module__}\n" in text


FILE = re.compile(r"\b(?:qkd_jax|tests|configs|benchmarks|examples|docs)/[\w./-]*\.\w+")
# What the examples of CONTRIBUTING.md would add.
ADDED = "losses.reverse_kd"
PLACEHOLDER = re.compile(r"/(clipped|sigmas|tiny|two_teachers)\.py$")


@every_page
def test_every_file_that_a_page_names_is_there(page):
    for path in FILE.findall(page.read_text()):
        path = path.rstrip(".")
        assert PLACEHOLDER.search(path) or (ROOT / path).exists(), path


@every_page
def test_every_name_that_a_page_spells_is_there(page):
    text = page.read_text()
    for name in re.findall(r"\bqk\.((?:\w+\.)*\w+)", text):
        if name == ADDED:
            continue
        found = qk
        for part in name.split("."):
            assert hasattr(found, part), f"qk.{name}"
            found = getattr(found, part)
    for room, name in re.findall(r"`(ptq|presets|numerics|weights|deploy)\.(\w+)", text):
        package = "qkd_jax.quantize" if room == "presets" else "qkd_jax"
        assert hasattr(importlib.import_module(f"{package}.{room}"), name), f"{room}.{name}"


@pytest.mark.slow
def test_the_figures_are_drawn_by_their_script(tmp_path):
    drawn = script("make_figures").main([f"--out={tmp_path}", "--steps=5", "--seeds=2"])
    shown = {name for page in PAGES for name in re.findall(r"figures/([\w.]+)", page.read_text())}
    assert {path.name for path in drawn} == shown
    assert {path.name for path in (ROOT / "docs" / "figures").iterdir()} == shown
    for path in drawn:
        assert path.read_text().rstrip().endswith("</svg>") and path.stat().st_size > 5_000
