"""Imports go one way: a walk over every file's syntax tree, which imports nothing itself."""

import ast
import dataclasses
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "qkd_jax"

# From the bottom up; a room imports from the rows above its own, and within itself.
LAYERS: tuple[tuple[set[str], ...], ...] = (
    ({"checks"}, {"trees"}, {"whole_files"}),
    ({"graph"}, {"processes"}),
    ({"numerics"}, {"hierarchy"}),
    ({"quantizers"}, {"losses"}),
    (
        {"observers"},
        {"metrics"},
    ),  # an observer searches with the quantizers; metrics take logits in
    ({"models"}, {"data"}),
    ({"quantize"},),
    ({"mixed_precision"}, {"distillation"}, {"record"}),
    ({"training"},),
    ({"data_free"},),
    ({"ptq"}, {"weights"}),  # before deploy, since converting folds BatchNorm
    ({"deploy"}, {"report"}),
    ({"experiment"},),
    ({"launch"},),
    ({"configs"},),
)
LEVEL = {name: level for level, row in enumerate(LAYERS) for part in row for name in part}
PART = {name: part for row in LAYERS for part in map(frozenset, row) for name in part}

# In these a file is one method, and no method knows another; what they share lies in numerics or,
# for losses, in `losses/inputs`.
PURE = ("quantizers", "observers", "losses")
SHARED = {"losses": "qkd_jax.losses.inputs"}
# Imported inside the functions that use them, so that `--help` and a first import stay quick.
LATE = (
    *("grain", "tensorflow_datasets", "orbax", "matplotlib"),
    *("onnx", "onnxruntime", "openvino", "ai_edge_litert", "flatbuffers"),
)
NEVER = ("tensorflow", "sklearn", "torch")
# Recipes are rows of these, or a sweep takes all their names: a config reads them when called.
TABLES_OF_CONFIGS = ("qkd_jax.losses", "qkd_jax.data", "qkd_jax.quantizers")


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name: where it stands, and whether that is at module level."""

    file: pathlib.Path
    line: int
    name: str
    at_import: bool

    def __str__(self):
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def files():
    paths = [*PACKAGE.rglob("*.py"), *ROOT.glob("configs/**/*.py"), ROOT / "launch.py"]
    return sorted(path for path in paths if path.exists())


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(path, source=None):
    """Every import of a file; `from a import b` names a.b where that is a module, else a."""
    tree = ast.parse(path.read_text() if source is None else source)
    package = module_name(path) if path.name == "__init__.py" else module_name(path.parent / "x")
    package = package.removesuffix(".x")
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            at_import = False
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            at_import = False
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, *filter(None, [base])])
            joined = [f"{base}.{alias.name}" for alias in node.names]
            ours = base.split(".")[0] in ("qkd_jax", "configs")
            names = [j if not ours or is_module(j) else base for j in joined]
        found.extend(Import(path, node.lineno, name, at_import) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import)

    visit(tree, True)
    return found


ALL = [entry for path in files() for entry in imports(path)]


def part_of(module):
    """The name of `LAYERS` that a module of ours belongs to; "" for the package's own root."""
    parts = module.split(".")
    return (parts[1] if len(parts) > 1 else "") if parts[0] == "qkd_jax" else parts[0]


def ours(entries):
    return [e for e in entries if e.name.split(".")[0] in ("qkd_jax", "configs", "launch")]


def problems_of_layers(entries):
    problems = []
    for entry in ours(entries):
        here, there = part_of(module_name(entry.file)), part_of(entry.name)
        if here == "":  # qkd_jax/__init__.py gathers the public names
            continue
        if there == "":
            # launch.py and outsiders may take the whole package; its own parts would go in circles.
            problems += [f"{entry}: name the module"] * (here not in ("launch",))
        elif PART[here] != PART[there] and LEVEL[there] >= LEVEL[here]:
            problems.append(f"{entry}: {there} is not below {here}")
    return problems


def problems_of_siblings(entries):
    problems = []
    for entry in ours(entries):
        here, there = module_name(entry.file).split("."), entry.name.split(".")
        pure = len(here) > 2 and here[1] in PURE
        shared = SHARED.get(here[1], "") if pure else ""
        if shared and ".".join(there).startswith(shared):
            continue
        if pure and there[:2] == here[:2] and there != here:
            problems.append(f"{entry}: a file of {here[1]} stands alone; share through numerics")
    return problems


def arrows(entries):
    """{module: modules that it imports}, of ours, wherever in the file the import stands."""
    found = {module_name(path): set() for path in files()}
    for entry in ours(entries):
        name = module_name(entry.file)
        found.setdefault(name, set()).update({entry.name} - {name})
    return found


def circles(graph):
    """Groups of nodes that reach each other (Tarjan), each sorted."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def problems_of_circles(entries):
    return ["in a circle: " + ", ".join(group) for group in circles(arrows(entries))]


def rooms():
    """{room: rooms that it imports}: the picture of the house, from the files."""
    found = {}
    for module, names in arrows(ALL).items():
        here = part_of(module)
        found.setdefault(here, set()).update({part_of(name) for name in names} - {here, ""})
    found.pop("", None)  # qkd_jax/__init__.py gathers the public names
    return found


def picture():
    """The rooms from the bottom up, each with the rooms that it imports from."""
    order = sorted(rooms().items(), key=lambda row: (LEVEL[row[0]], row[0]))
    return "\n".join(
        f"{room:16} <- {' '.join(sorted(below, key=lambda r: (LEVEL[r], r))) or '-'}"
        for room, below in order
    )


def problems_of_flags(entries):
    # `workers` reads none: it tells Grain, which has flags of its own, that they are parsed.
    names = ("absl.flags", "absl.app", "ml_collections.config_flags")
    return [
        str(entry)
        for entry in entries
        if any(entry.name == n or entry.name.startswith(f"{n}.") for n in names)
        and entry.file not in (ROOT / "launch.py", ROOT / "qkd_jax" / "data" / "workers.py")
    ]


def problems_of_late_imports(entries):
    return [
        str(entry)
        for entry in entries
        if (entry.at_import and entry.name.split(".")[0] in LATE)
        or entry.name.split(".")[0] in NEVER
    ]


def problems_of_data(entries):
    return [
        str(entry)
        for entry in entries
        if (PACKAGE / "data") in entry.file.parents
        and entry.name.split(".")[0] in ("jax", "jaxlib", "flax", "optax")
    ]


def problems_of_configs(entries):
    """A config file loads without the library; its functions may read two of its tables."""
    return [
        str(entry)
        for entry in entries
        if (ROOT / "configs") in entry.file.parents
        and entry.name.split(".")[0] not in ("configs", "ml_collections", *sys.stdlib_module_names)
        and (entry.at_import or entry.name not in TABLES_OF_CONFIGS)
    ]


def test_rooms_are_in_no_circle():
    print(picture())
    assert circles(rooms()) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_a_file_name_means_one_thing():
    seen = {}
    for path in files():
        if PACKAGE in path.parents and not path.name.startswith("__"):
            seen.setdefault(path.stem, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in seen.items() if len(paths) > 1} == {}


def test_every_module_has_a_layer():
    found = {part_of(module_name(path)) for path in files()} - {""}
    assert found == set(LEVEL), f"add to LAYERS: {sorted(found - set(LEVEL))}, or take out"


CHECKS = [
    problems_of_layers,
    problems_of_circles,
    problems_of_siblings,
    problems_of_flags,
    problems_of_late_imports,
    problems_of_data,
    problems_of_configs,
]


@pytest.mark.parametrize("check", CHECKS)
def test_rule(check):
    assert check(ALL) == []


@pytest.mark.parametrize(
    ("check", "file", "source"),
    [
        (problems_of_layers, "qkd_jax/models/x.py", "from qkd_jax.quantize import Rule"),
        (problems_of_layers, "qkd_jax/models/x.py", "def f():\n    from qkd_jax import quantize"),
        (problems_of_layers, "qkd_jax/models/x.py", "import qkd_jax.data.draws"),
        (problems_of_layers, "qkd_jax/models/x.py", "from ..training import step"),
        (problems_of_layers, "qkd_jax/losses/x.py", "from qkd_jax.observers import minmax"),
        (problems_of_layers, "qkd_jax/numerics/x.py", "import qkd_jax as qk"),
        (problems_of_layers, "qkd_jax/ptq/x.py", "from qkd_jax import deploy"),
        (problems_of_siblings, "qkd_jax/quantizers/x.py", "from qkd_jax.quantizers import lsq"),
        (problems_of_siblings, "qkd_jax/quantizers/x.py", "from . import lsq"),
        (problems_of_siblings, "qkd_jax/losses/x.py", "from qkd_jax.losses import LOSSES"),
        (problems_of_siblings, "qkd_jax/losses/inputs/x.py", "from qkd_jax.losses import relation"),
        (problems_of_layers, "qkd_jax/quantize/x.py", "from qkd_jax.training import optim"),
        (problems_of_layers, "qkd_jax/distillation/x.py", "import qkd_jax.training.step"),
        (problems_of_layers, "qkd_jax/record/x.py", "from qkd_jax.distillation import taps"),
        (problems_of_layers, "qkd_jax/training/x.py", "from qkd_jax.data_free import inversion"),
        (problems_of_flags, "qkd_jax/report/x.py", "from absl import flags"),
        (problems_of_flags, "configs/x.py", "import absl.flags as f"),
        (problems_of_late_imports, "qkd_jax/report/x.py", "import matplotlib.pyplot as plt"),
        (problems_of_late_imports, "qkd_jax/report/x.py", "class A:\n    import onnx"),
        (problems_of_late_imports, "qkd_jax/data/x.py", "def f():\n    import tensorflow"),
        (problems_of_data, "qkd_jax/data/x.py", "def f():\n    import jax.numpy as jnp"),
        (problems_of_configs, "configs/x.py", "from qkd_jax import quantize"),
        (problems_of_configs, "configs/x.py", "from qkd_jax.data import DATASETS"),
        (problems_of_configs, "configs/x.py", "def f():\n    from qkd_jax.models import MODELS"),
        (problems_of_configs, "configs/x.py", "def f():\n    from qkd_jax.data import sources"),
        (problems_of_configs, "configs/x.py", "def f():\n    import jax"),
        (problems_of_configs, "configs/x.py", "def f():\n    from qkd_jax import quantize"),
        (problems_of_configs, "configs/x.py", "def f():\n    import qkd_jax"),
        (problems_of_configs, "configs/x.py", "from qkd_jax.losses import TABLE"),
        (problems_of_configs, "configs/x.py", "class A:\n    from qkd_jax.data import DATASETS"),
        (
            problems_of_configs,
            "configs/x.py",
            "def f():\n    from qkd_jax.losses.response import kd",
        ),
    ],
)
def test_each_rule_finds_its_offence(check, file, source):
    assert check(imports(ROOT / file, source))


def test_a_circle_is_found_wherever_the_import_stands():
    late = imports(PACKAGE / "trees.py", "def f():\n    from qkd_jax import checks")
    typed = imports(PACKAGE / "checks.py", "if TYPE_CHECKING:\n    from qkd_jax import trees")
    assert problems_of_circles(late) == problems_of_circles(typed) == []
    assert problems_of_circles(late + typed) == ["in a circle: qkd_jax.checks, qkd_jax.trees"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "qkd_jax/quantize/x.py",
            "from qkd_jax import checks, graph\nfrom qkd_jax.numerics import x",
        ),
        ("qkd_jax/losses/__init__.py", "from qkd_jax.losses.response import ce"),
        ("qkd_jax/data/x.py", "def f():\n    import grain"),
        ("qkd_jax/report/x.py", "if TYPE_CHECKING:\n    import onnx"),
        ("launch.py", "from absl import app, flags\ndef f():\n    import qkd_jax"),
        ("configs/x.py", "from configs.common import sgd\nimport ml_collections"),
        ("configs/x.py", "def f():\n    from qkd_jax.data import recipe_of"),
        ("configs/x.py", "def f():\n    from qkd_jax.losses import TABLE"),
        ("configs/x.py", "def f():\n    from qkd_jax import data"),
    ],
)
def test_what_is_allowed_passes(file, source):
    found = imports(ROOT / file, source)
    assert [problem for check in CHECKS for problem in check(found)] == []


if __name__ == "__main__":
    print(picture())
