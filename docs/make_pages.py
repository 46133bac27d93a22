"""Writes what the pages say of the code: docs/methods.md, and the picture of the rooms.

    python docs/make_pages.py        # or `make pages`

docs/methods.md comes from the tables of the library and the docstrings of their entries: a new
entry appears with the first line of its docstring and the sources that the docstring names. A
method whose docstring, or that of its file, names no source is an error. The picture of the rooms
is that of `tests/test_imports.py`, put between its two markers in each page of `WITH_ROOMS`.
`tests/docs/test_pages.py` fails where a page is not what this script writes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qkd_jax import data_free, hierarchy, losses, metrics, mixed_precision, ptq, weights
from qkd_jax.data import DATASETS
from qkd_jax.deploy import convert, save, save_stablehlo, to_onnx
from qkd_jax.distillation.adaptors import ADAPTORS
from qkd_jax.experiment import STAGES
from qkd_jax.models import MODELS
from qkd_jax.observers import OBSERVERS
from qkd_jax.quantize import diagnostics, presets, targets
from qkd_jax.quantizers import QUANTIZERS

ROOT = Path(__file__).resolve().parents[1]
METHODS_PAGE = ROOT / "docs" / "methods.md"
ARCHITECTURE_PAGE = ROOT / "docs" / "architecture.md"
WITH_ROOMS = (ARCHITECTURE_PAGE, ROOT / "CONTRIBUTING.md")

ARXIV = r"arXiv\s+(\d{4}\.\d{4,5})"
VENUE = r"((?:CVPR|ICCV|ECCV|ICML|ICLR|NeurIPS|NIPS|GTC),?\s+\d{4})"

# Features that are no entry of a table: what they are called, and the object that has the facts.
OTHERS: tuple[tuple[str, Any], ...] = (
    ("`qk.sensitivity`, `qk.allocate`: bits by layer under a budget", mixed_precision),
    ("`training.synthesize`, the stage `synthesize`: images from BatchNorms", data_free.synthesize),
    ("`qk.diagnose`, the stage `diagnose`", diagnostics),
    ("`qk.convert`, `qk.integer_apply`", convert),
    ("`qk.deploy.save`, `load`: an integer model as files", save),
    ("`qk.deploy.save_stablehlo`", save_stablehlo),
    ("`qk.deploy.to_onnx`", to_onnx),
    ("`qk.weights.load`, `save`: public checkpoints in, students out", weights),
    ("`hierarchy.ClassTree`, `hierarchy.TREES`", hierarchy),
    ("`metrics.hierarchical`: severity of mistakes", metrics.hierarchical),
)


def unwrapped(entry: Any) -> Any:
    return entry.func if isinstance(entry, functools.partial) else inspect.unwrap(entry)


def module_of(entry: Any) -> ModuleType:
    entry = unwrapped(entry)
    return entry if isinstance(entry, ModuleType) else importlib.import_module(entry.__module__)


def file_of(entry: Any) -> str:
    """The path of the entry's file, from the root of the repository."""
    return str(Path(inspect.getfile(unwrapped(entry))).resolve().relative_to(ROOT))


def one_line(name: str, entry: Any) -> str:
    """The docstring's first line, without its source and its full stop."""
    text = inspect.getdoc(unwrapped(entry))
    if not text:
        raise ValueError(f"{name!r} in {file_of(entry)} has no docstring; say there what it does.")
    line = text.splitlines()[0].strip().removesuffix(".")
    return re.sub(r"\s*\([^()]*(?:\d{4})[^()]*\)$", "", line).replace("|", "\\|")


def sources(text: str) -> list[str]:
    """The papers that a text names, in order: arXiv numbers as links, else venue and year."""
    found = [
        (m.start(), f"[{m[1]}](https://arxiv.org/abs/{m[1]})") for m in re.finditer(ARXIV, text)
    ]
    found += [
        (m.start(), " ".join(m[1].replace(",", "").split())) for m in re.finditer(VENUE, text)
    ]
    return list(dict.fromkeys(name for _, name in sorted(found)))


def papers(name: str, entry: Any) -> str:
    """The sources of a method: those of its own docstring, else those of its file."""
    own = inspect.getdoc(unwrapped(entry)) or ""
    found = sources(own) or sources(inspect.getdoc(module_of(entry)) or "")
    if not found:
        raise ValueError(
            f"{name!r} in {file_of(entry)} names no source. End its docstring with the authors, "
            "the year and 'arXiv <number>', or the conference and its year ('CVPR 2017')."
        )
    return ", ".join(found)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: object) -> str:
    return f"`{text}`"


def method_rows(entries: Mapping[str, Any]) -> list[list[str]]:
    return [
        [code(name), one_line(name, entry), papers(name, entry), code(file_of(entry))]
        for name, entry in entries.items()
    ]


METHOD = ("name", "what it is", "source", "file")


def loss_table() -> str:
    def taps(side: str | Sequence[str]) -> str:
        return side if isinstance(side, str) else " + ".join(side) or "nothing"

    rows = []
    for row, loss in zip(method_rows(losses.LOSSES), losses.TABLE.values(), strict=True):
        name, what, source, file = row
        looks = ", ".join(map(taps, loss.default_taps)) if loss.has_taps else "-"
        weight = "-" if loss.recipe is None else f"{loss.recipe['weight']:g}"
        beside = "-" if loss.recipe is None else f"{loss.ce_weight:g}"
        adaptor = code(loss.adaptor) if loss.adaptor else "-"
        rows.append([name, what, looks, adaptor, weight, beside, source, file])
    head = (*METHOD[:2], "taps", "adaptor", "weight", "cross-entropy", *METHOD[2:])
    return table(head, rows)


def adaptor_table() -> str:
    rows = []
    for name, adaptor in ADAPTORS.items():
        users = [code(loss) for loss, row in losses.TABLE.items() if row.adaptor == name]
        rows.append(
            [
                code(name) if name else "none",
                one_line(name, adaptor),
                ", ".join(users) if name else "all others",
                code(file_of(adaptor)),
            ]
        )
    return table(("name", "what it is", "losses", "file"), rows)


def ptq_table() -> str:
    methods = {name: getattr(ptq, name) for name in ptq.__all__ if name != "equalization_pairs"}
    rows = method_rows(methods)
    for row, method in zip(rows, methods.values(), strict=True):
        test = ROOT / "tests" / "ptq" / f"test_{Path(file_of(method)).name}"
        if not test.exists():
            raise ValueError(f"{row[0]} has no test file {test.relative_to(ROOT)}; write it.")
        row.append(code(test.relative_to(ROOT)))
    return table((*METHOD, "test"), rows)


def model_table() -> str:
    def fields(entry: Any) -> str:
        if not isinstance(entry, functools.partial):
            return ""
        return code(", ".join(f"{key}={value}" for key, value in entry.keywords.items()))

    rows = [
        [code(name), one_line(name, entry), fields(entry), code(file_of(entry))]
        for name, entry in MODELS.items()
    ]
    return table(("name", "what it is", "with", "file"), rows)


def data_table() -> str:
    rows = []
    for name, source in DATASETS.items():
        recipe = source.recipe
        sizes = f"{recipe.epochs} x {recipe.batch_size}" if recipe else "-"
        augment = ", ".join(map(code, recipe.augment)) if recipe else ""
        image = " x ".join(map(str, source.image_shape))
        classes = str(source.num_classes)
        row = [code(name), source.description, image, classes, source.kind, sizes, augment or "-"]
        rows.append(row)
    head = ("name", "what it is", "image", "classes", "kind", "epochs x batch", "augmentation")
    return table(head, rows)


def stage_table() -> str:
    rows = []
    for name, kind in STAGES.items():
        # A method of the library says itself what it does; its stage only calls it.
        method = getattr(ptq, name, data_free.GENERATORS.get(name, kind.run))
        fields = ", ".join(map(code, kind.parameters)) or "-"
        rows.append([code(name), one_line(name, method), fields])
    return table(("kind", "what it does", "fields"), rows)


def preset_table() -> str:
    def operand(fields: Mapping[str, Any] | None) -> str:
        if not fields:
            return "float"
        words = [f"{fields['bits']} bits", fields.get("quantizer", "uniform")]
        if isinstance(fields.get("granularity"), int):
            words.append(f"groups of {fields['granularity']}")
        elif "granularity" in fields:
            words.append(f"per {fields['granularity']}")
        if fields.get("narrow_range"):
            words.append("narrow range")
        if "scale_format" in fields.get("options", {}):
            words.append(f"{fields['options']['scale_format']} scales")
        if fields.get("dynamic"):
            words.append("dynamic range")
        return ", ".join(words)

    rows = []
    for name, rules in presets.PRESETS.items():
        last: Mapping[str, Any] = rules[-1] if rules else {}
        ends = operand(rules[0].get("weight")) if len(rules) > 1 else "the same"
        rows.append([code(name), operand(last.get("weight")), operand(last.get("input")), ends])
    return table(("name", "weights", "inputs", "weights of the first and last layer"), rows)


def target_table() -> str:
    def widths(bits: Sequence[int]) -> str:
        whole = list(bits) == list(range(bits[0], bits[-1] + 1)) and len(bits) > 1
        return f"{bits[0]} to {bits[-1]}" if whole else ", ".join(map(str, bits))

    rows = [
        [
            code(name),
            target.file,
            widths(target.weight_bits),
            widths(target.input_bits),
            target.engine or "not run here",
        ]
        for name, target in targets.TARGETS.items()
    ]
    return table(("name", "file", "weight bits", "input bits", "engine that runs it here"), rows)


def config_table() -> str:
    rows = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if hasattr(module, "get_config"):
            rows.append([code(f"configs/{path.name}"), one_line(path.stem, module)])
    return table(("config", "what it runs"), rows)


def other_table() -> str:
    rows = []
    for what, entry in OTHERS:
        own = inspect.getdoc(unwrapped(entry)) or ""
        found = sources(own) or sources(inspect.getdoc(module_of(entry)) or "")
        rows.append([what, ", ".join(found) or "-", code(file_of(entry))])
    return table(("name", "source", "file"), rows)


# Heading, introduction, table.
SECTIONS: tuple[tuple[str, str, Callable[[], str]], ...] = (
    (
        "Quantizers",
        """
A name goes into `Spec(quantizer="lsq")` or a preset such as `"w4a4:lsq"`. Test one with `pytest
tests/quantizers -k lsq`.""",
        lambda: table(METHOD, method_rows(QUANTIZERS)),
    ),
    (
        "Observers",
        """
An observer finds the range that a grid spans: `calibrate(net, variables, batches,
observer="mse")`. Test one with `pytest tests/observers -k mse`.""",
        lambda: table(METHOD, method_rows(OBSERVERS)),
    ),
    (
        "Losses",
        """
`qk.losses.kd` and `LOSSES["kd"]` are the same function. A config names it in `learn`, and
`configs/feature_kd.py:loss=kd` trains a student by it, at the weight of the table and with the
cross-entropy beside it. A loss on features looks at the taps of student and teacher, through an
adaptor where it has one ([distillation](distillation.md)). Test one with `pytest tests/losses -k
kd`.""",
        loss_table,
    ),
    (
        "Adaptors",
        """
What stands between the features of two nets and a loss. It learns beside the student and is left
out of the deployed net.""",
        adaptor_table,
    ),
    (
        "Post-training methods",
        """
Functions from variables to variables, `ptq.adaround(net, variables, batches)`, most of them also
a kind of stage. BatchNorm comes first, then what changes the float net (`equalize`,
`absorb_bias`, `smooth`, `awq`, `rotate`, `rotate_inputs`), then `calibrate`, then what changes the
quantized one (`hqq`, `propagate_errors`, `gptq`, `adaround`, `brecq`, `qdrop`,
`correct_bias`).""",
        ptq_table,
    ),
    (
        "Data-free generators",
        """
Images from a trained net alone, to distil or to calibrate on (`configs/data_free.py`).""",
        lambda: table(METHOD, method_rows(data_free.GENERATORS)),
    ),
    (
        "Experiments",
        """
`python launch.py --config=configs/<file> --workdir=runs/<name>`; `--mode=inspect` prints what it
would do.""",
        config_table,
    ),
    (
        "Kinds of stages",
        """
`config.stages.<name> = dict(kind=...)`; `config.schedule` names the stages in their order.""",
        stage_table,
    ),
    (
        "Presets of rules",
        """
A preset is a name for a set of rules: `rules="w4a4"` in a config, `presets.rules("w4a4",
model=model, images=images)` in a program. `w<k>a<k>` is understood for any widths and
`w<k>a<k>:<quantizer>` for any quantizer of the table above; the docstring of
`qkd_jax/quantize/presets.py` lists the endings `:static`, `:dynamic`, `:integer` and `:fused`.""",
        preset_table,
    ),
    (
        "Models",
        """
`models.create(name, num_classes=10, width=8)`; every other CIFAR ResNet of depth 6n + 2 is
understood by name ("resnet26").""",
        model_table,
    ),
    (
        "Data sets",
        """
Embedded sets are part of the package; a prepared one is made once by `python -m
qkd_jax.data.prepare <name>`. Nothing is downloaded silently.""",
        data_table,
    ),
    (
        "Deployment targets",
        """
What an engine takes: `config.target`, `--mode=export --target=`. More in
[deployment](deployment.md).""",
        target_table,
    ),
    ("Beside the tables", "", other_table),
)


def methods_page() -> str:
    """The text of docs/methods.md."""
    parts = [
        "# Methods",
        "<!-- Written by docs/make_pages.py from the tables and docstrings; do not edit. -->",
        "Everything that has a name, with its source and its file. To add one, see\n"
        "[contributing](contributing.md).",
    ]
    for heading, introduction, rows in SECTIONS:
        parts += [f"## {heading}", *filter(None, [introduction.strip()]), rows()]
    return "\n\n".join(parts) + "\n"


def filled(text: str, name: str, content: str) -> str:
    """A page's text with some content between its markers of this name."""
    place = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->\n)", re.S)
    result, count = place.subn(lambda match: f"{match[1]}\n{content}\n\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"the page has {count} places for the {name}; it must have one.")
    return result


def with_rooms(path: Path) -> str:
    """The text of a page with the rooms, their arrows and, for the architecture, their subjects."""
    house = runpy.run_path(str(ROOT / "tests" / "test_imports.py"))
    text = filled(path.read_text(), "rooms", f"```text\n{house['picture']()}\n```")
    if path != ARCHITECTURE_PAGE:
        return text
    rows = []
    for room in sorted(house["LEVEL"], key=lambda room: (house["LEVEL"][room], room)):
        package = room if room in ("launch", "configs") else f"qkd_jax.{room}"
        rows.append([code(room), one_line(room, importlib.import_module(package))])
    return filled(text, "subjects", table(("room", "its subject"), rows))


def main() -> None:
    METHODS_PAGE.write_text(methods_page())
    for path in WITH_ROOMS:
        path.write_text(with_rooms(path))


if __name__ == "__main__":
    main()
