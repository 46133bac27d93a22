"""Every block of Python in the pages runs, and every command with `launch.py` is one it takes.

The Python blocks of a page are one program, in the order of the page. A block behind the line
`<!-- parsed only -->` is part of something larger, and is only parsed. CONTRIBUTING.md's blocks are
whole files: `tests/test_contributing.py` puts them where they belong.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

import launch
from qkd_jax.experiment import read, sweep_list
from qkd_jax.quantize.targets import TARGETS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^(<!-- parsed only -->\n)?```python\n(.*?)^```", flags=re.M | re.S)
WHOLE_FILES = ("CONTRIBUTING.md",)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[bool, str]]:
    """(whether the block runs, its code) of each Python block of a page."""
    runs = name_of(page) not in WHOLE_FILES
    return [(runs and not marker, code) for marker, code in PYTHON.findall(page.read_text())]


def run(page: Path) -> dict:
    names: dict = {"__name__": "page"}
    for runs, code in blocks(page):
        if runs:
            exec(compile(code, name_of(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name_of)
def test_python_blocks_parse(page):
    for _, code in blocks(page):
        # An entry of a dict, which stands for a line to add.
        compile("{" + code + "}" if re.match(r'\s+"', code) else code, name_of(page), "exec")


RUN = [p for p in PAGES if any(runs for runs, _ in blocks(p))]
CHECKED = ("README.md", "docs/own.md")  # which have tests of their own below


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in RUN if name_of(p) not in CHECKED], ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(run(page)) > 1


@pytest.mark.slow
def test_the_library_example_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "README.md")
    assert (tmp_path / "student.onnx").stat().st_size > 0
    assert "0 MISSED" in capsys.readouterr().out
    # The integer net has BatchNorm folded in, which moves a value by a last bit and so decides near
    # ties between two codes (docs/results.md): here in one image of 64.
    want, got = np.asarray(names["student_logits"]), np.asarray(names["logits"])
    gaps = np.abs(got - want).max(axis=-1) / np.abs(want).max()
    assert np.sum(gaps > 1e-4) <= 1 and gaps.max() < 0.01
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.slow
def test_the_examples_for_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    first, loop, *others = [code for _, code in blocks(ROOT / "docs" / "own.md")]
    exec(compile(first, "own.md", "exec"), names)
    assert names["loss"].shape == (64,)
    assert (tmp_path / "student.onnx").stat().st_size > 0
    assert "0 MISSED" in capsys.readouterr().out
    # The integer net is the trained net with BatchNorm folded in.
    want, got = names["student_logits"], names["logits"]
    np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))
    exec(compile(loop, "own.md", "exec"), names)
    assert len(names["losses"]) == 5 and names["losses"][-1] < names["losses"][0]
    assert others
    for example in others:
        exec(compile(example, "own.md", "exec"), names)
    learned = names["static"].apply(names["variables"], names["images"])
    floats = names["teacher_logits"]
    assert np.linalg.norm(learned - floats) < 0.2 * np.linalg.norm(floats)


def command_of(line: str) -> str:
    """The call of Python in a line of shell, without a loop's end or a comment; "" without one."""
    before, found, rest = line.partition("python ")
    if before.count('"') % 2:  # inside of a quoted argument of another command
        rest = rest.partition('"')[0]
    return found + re.split(r"; done|\s+# ", rest)[0].strip()


def commands() -> list[str]:
    """The calls of Python in all pages, in blocks and in sentences, loop variables put at 0."""
    found: list[str] = []
    for page in PAGES:
        text = page.read_text()
        # Fences in pairs, whatever their language: else the end of one block opens the next.
        blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
        shell = [block for language, block in blocks if language in ("", "bash")]
        lines = [line for block in shell for line in block.replace("\\\n", "").splitlines()]
        lines += [" ".join(code.split()) for code in re.findall(r"`(python [^`]+)`", text)]
        calls = filter(None, map(command_of, lines))
        found += [re.sub(r"\$\w+|\{seed\}", "0", call) for call in calls]
    # Not: usage lines, and the config of CONTRIBUTING's example, which has a test there.
    left_out = re.compile(r"[<\[]|\.\.\.|two_teachers")
    return [call for call in dict.fromkeys(found) if not left_out.search(call)]


COMMANDS = commands()


def parsed(arguments: list[str]) -> flags.FlagValues:
    """The flags of launch.py for one command, apart from those of other commands."""
    values = flags.FlagValues()
    argv = ["launch.py", *arguments]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    modes = ("run", "eval", "inspect", "export", "report")
    flags.DEFINE_enum("mode", "run", modes, "", flag_values=values)
    flags.DEFINE_string("target", "", "", flag_values=values)
    flags.DEFINE_string("against", "", "", flag_values=values)
    flags.DEFINE_string("profile_steps", "", "", flag_values=values)
    flags.DEFINE_bool("sweep", False, "", flag_values=values)
    flags.DEFINE_integer("jobs", 1, "", flag_values=values)
    flags.DEFINE_integer("sweep_index", None, "", flag_values=values)
    flags.DEFINE_string("coordinator", "", "", flag_values=values)
    flags.DEFINE_integer("processes", None, "", flag_values=values)
    flags.DEFINE_integer("process", None, "", flag_values=values)
    assert values(argv) == ["launch.py"]
    return values


def test_the_pages_have_commands():
    assert sum("launch.py" in command for command in COMMANDS) >= 25


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch.py" in c])
def test_launch_takes_the_command(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, _, *arguments = shlex.split(command)
    if any(argument.startswith("--sweep") for argument in arguments):
        return takes_the_sweep(arguments)
    values = parsed(arguments)
    if values["mode"].value in ("run", "inspect"):
        read(values["config"].value)
    assert values["target"].value in ("", *TARGETS)


def takes_the_sweep(arguments: list[str]) -> None:
    """A command with --sweep: its flags, and the first of its runs."""
    rest, text, fields = launch.split_sweep(arguments)
    parsed(rest)
    found, own = launch.sweep_of(text)
    entry = sweep_list.entries_of(found, fields)[0]
    read(launch.config_of(*sweep_list.command_of(sweep_list.base_of(text, own), entry)))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch.py" not in c])
def test_other_commands_call_what_is_there(command):
    _, what, *rest = shlex.split(command)
    if what == "-m":
        path = ROOT.joinpath(*rest[0].split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), command
    elif what != "-c":
        assert (ROOT / what).exists(), command
