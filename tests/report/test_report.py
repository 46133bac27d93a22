"""The results table and the page, from whole run folders and from pieces of one."""

import base64
import contextlib
import importlib.util
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from mutation import COUNT, accepted, mutated, mutated_json, mutated_text
from rich.console import Console

from qkd_jax import report
from qkd_jax.experiment.results import printer, show
from qkd_jax.record.folder import RunFolder
from qkd_jax.record.metrics_log import read_metrics
from qkd_jax.report import plots
from qkd_jax.report.table import count, number, percent

spec = importlib.util.spec_from_file_location("made_up", Path(__file__).parent / "made_up.py")
assert spec is not None and spec.loader is not None
made_up = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made_up)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made_up.whole_run(folder)
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    made_up.whole_run(folder, made_up.LAYERS[:2])
    return folder


def printed(results, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w", encoding="utf-8"))
    with console.file:
        console.print(report.table(results))
    return console.export_text()


def text_of(page: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", page)


def test_the_table_on_a_narrow_terminal():
    text = printed(made_up.results())
    for cell in ("97.13", "310,000", "32/32", "2/2", "0.1874", "QKD", "qat_only", "96.00", "400"):
        assert cell in text, cell
    assert "…" not in text
    assert "1,497 test images" in text
    squeezed = " ".join(text.split())
    assert "agreement: same argmax as teacher_before" in squeezed
    assert "student on ONNX Runtime: top-1 95.06 %, same argmax as deployed 100.00 %," in squeezed
    assert "as trained 99.21 %, largest logit difference 3.1e-06" in squeezed
    assert "3.1e-06" in squeezed


def test_a_table_of_little():
    assert "results" in printed({})
    text = printed({"rows": [{"net": "[b]net", "method": "x", "top1": None, "loss": None}]})
    assert "[b]net" in text and "agreement" not in text and "32/32" in text


def test_numbers_as_text():
    assert (percent(0.93249), percent(None), percent(1)) == ("93.25", "-", "100.00")
    assert (number(0.12345), number(1.2e-7), number(0.0)) == ("0.1235", "1.2e-07", "0.0000")
    assert (count(5312), count(None)) == ("5,312", "-")


def test_the_page_stands_by_itself(whole):
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert len(page) < 1_500_000
    assert "<script" not in page and "@import" not in page
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert links and all(link.startswith("#") for link in links)
    assert not re.findall(r"url\((?!#)", page)
    for part in ("results", "latency", "curves", "steps", "weights", "layers", "run", "notes"):
        assert f'<section id="{part}">' in page, part
    assert page.count("<svg ") == 4
    words = text_of(page)
    assert "pretrain teacher" in words and "test top-1 (%)" in words
    assert "stage2_block0/shortcut" in words and "input step" in words
    assert "97.13" in page and "3.1e-06" in page and "9,856" in page
    assert "One run with one seed (seed 1)" in page


def test_the_page_is_the_same_every_time(small, tmp_path):
    shutil.copytree(small, tmp_path / "copy")
    assert report.render(tmp_path / "copy") == report.render(small)


def test_tick_labels_are_not_cut(whole):
    svg = plots.quantizer_paths(read_metrics(whole), "weight", net="student")
    texts = re.findall(r"<text[^>]*>(-?0\.\d+)</text>", svg.replace("\u2212", "-"))
    assert any(len(text) > 4 for text in texts)
    panels = svg.split('id="axes_')[1:]
    assert len(panels) == len(made_up.LAYERS)
    for panel in panels:
        ticks = re.findall(r"<text[^>]*>(0\.\d+)</text>", panel)
        assert len(set(ticks)) == len(ticks), ticks


def test_layers_are_in_the_order_of_the_net(whole):
    page = (whole / "report.html").read_text(encoding="utf-8")
    weights = page[page.index('<section id="weights">') :]
    titles = [word for word in text_of(weights) if word in made_up.LAYERS]
    assert titles == made_up.LAYERS


FILES = ["config.json", "run.json", "metrics.jsonl", "results.json", "timings.json", "model"]


@pytest.mark.parametrize("missing", [*FILES, "all"])
def test_a_run_that_was_interrupted(small, tmp_path, missing):
    folder = tmp_path / "run<1>"
    shutil.copytree(small, folder)
    for name in FILES if missing == "all" else [missing]:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report.write(folder).read_text(encoding="utf-8")
    assert ("no results yet" in page) == (missing in ("results.json", "all"))
    assert ('id="curves"' in page) == (missing not in ("metrics.jsonl", "all"))
    assert ('id="weights"' in page) == (missing not in ("model", "all"))
    assert "run<1>" not in page


def test_a_damaged_file_and_no_folder(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        report.write(tmp_path / "absent")
    (tmp_path / "results.json").write_text('{"rows": [')
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert re.search(r"Files of this run are damaged:.*results\.json is not valid JSON", page)


def test_names_are_escaped(tmp_path):
    run = RunFolder(tmp_path)
    evil = "<script>alert(1)</script>&"
    run.write_results({"experiment": evil, "rows": [{"net": evil, "method": evil, "top1": 0.5}]})
    run.write_config({"nets": {evil: {}}})
    run.write_timings({"latency": [{"model": evil, "ms": 1.0}], "stages": {evil: {"s": 1.5}}})
    run.metrics.log(1, evil, "train", {f"{evil}/loss": 0.5})
    run.metrics.log(1, evil, "quant", {f"{evil}/stem/weight_quantizer/step": 0.5})
    assert "<script" not in report.render(tmp_path)


def test_curves_with_gaps_nulls_and_many_points():
    rows = [
        {"step": step, "stage": stage, "split": "train", "values": {f"{net}/loss": value}}
        for step, stage, net, value in [
            *((k, "a", "one", None if k == 5 else 1 / k) for k in range(1, 3001)),
            *((3000 + k, "b", "two", 0.5) for k in range(1, 10)),
            *((3010 + k, "c", "one", -0.5) for k in range(1, 10)),
        ]
    ]
    assert plots.stage_spans(rows) == [("a", 0, 3000), ("b", 3000, 3009), ("c", 3009, 3019)]
    svg = plots.curves(rows)
    assert len(svg) < 100_000
    assert plots.curves([]) is None and plots.quantizer_paths(rows, "input") is None
    assert plots.histograms({}) is None
    only_test = [{"step": 1, "stage": "a", "split": "test", "values": {"one/top1": 0.5}}]
    assert "test top-1" in plots.curves(only_test)


def test_thinning_keeps_the_mean():
    points = [(k, float(k)) for k in range(plots.MAX_POINTS * 4)]
    steps, values = plots._thin(points)
    assert len(steps) == plots.MAX_POINTS and steps[-1] == points[-1][0]
    assert np.mean(values) == np.mean([v for _, v in points])


def test_weight_histograms_count_codes_and_weights():
    weight = np.array([[-2.0, 0.3], [0.0, 1.2]])
    scale = np.array([[1.0, 0.1]])
    codes = np.array([[-2, 1], [0, 1]])
    made = report.weight_histograms(
        {"a": {"weight": weight, "codes": codes, "scale": scale}}, bins=4
    )
    layer = made["layers"]["a"]
    assert made["schema"] == 1 and json.loads(json.dumps(made)) == made
    assert (layer["codes"], layer["counts_codes"]) == ([-2, 0, 1], [1, 1, 2])
    assert sum(layer["counts_float"]) + layer["outside"] == 4
    assert (layer["scale_min"], layer["scale_max"]) == (0.1, 1.0)
    assert layer["counts_before"] is None and layer["label"] == ""
    both = {"weight": weight, "codes": codes, "scale": 0.5, "before": 0 * weight, "label": "int2"}
    layer = report.weight_histograms({"a": both})["layers"]["a"]
    assert sum(layer["counts_before"]) == 4 and layer["label"] == "int2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.zeros(3, int)}, "shapes differ: a weight"),
        ({"scale": np.ones(3)}, r"a scale has shape \(3,\), which does not broadcast"),
        ({"scale": np.ones((5, 2, 2))}, "does not broadcast"),
        ({"before": np.zeros(3)}, "a before"),
    ],
)
def test_histograms_of_shapes_that_do_not_fit(change, message):
    layer = {"weight": np.ones((2, 2)), "codes": np.ones((2, 2), int), "scale": np.ones(())}
    with pytest.raises(ValueError, match=message):
        report.weight_histograms({"a": {**layer, **change}})


def test_at_most_twelve_layers_with_first_and_last():
    picked = plots._pick([f"layer{i}" for i in range(53)])
    assert len(set(picked)) == plots.MAX_LAYERS
    assert (picked[0], picked[-1]) == ("layer0", "layer52")


def test_matplotlib_is_imported_only_when_drawing():
    import subprocess

    code = "import qkd_jax.report, sys; sys.exit('matplotlib' in sys.modules)"
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_damaged_log_says_what_it_left_out(small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    odd = [b'{"step": "x"}\n', b"\xff\n", b"[" * 10_000 + b"\n", lines[0].replace(b":", b"")]
    log.write_bytes(b"".join([*odd, *lines, b'{"torn": ']))
    page = report.html.render(folder)
    assert f"metrics.jsonl: 4 of {len(lines) + 4} lines are damaged" in page
    assert 'id="curves"' in page
    log.write_bytes(b"".join(lines))
    assert "Files of this run are damaged" not in report.html.render(folder)


@pytest.mark.slow
def test_pages_of_damaged_files(small, tmp_path):
    """Any value anywhere: the page is made."""
    folder, rng = tmp_path / "run", random.Random(0)
    shutil.copytree(small, folder)
    files = [p for p in sorted(folder.rglob("*.json")) if p.stat().st_size]
    for _ in range(40):  # each damages every file
        for path in files:
            value = json.loads((small / path.relative_to(folder)).read_text())
            path.write_text(json.dumps(mutated_json(value, rng)))
        page = report.html.render(folder)
        assert page.endswith("</html>\n")


@pytest.mark.parametrize(
    "name", ["results.json", "config.json", "run.json", "timings.json", "model/layers.json"]
)
def test_a_page_of_one_damaged_file(name, small, tmp_path):
    """It is left out, in words; these parts draw nothing, so that each page is quick."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(small / name, path)
    render = lambda: report.html.render(tmp_path)
    assert len(list(accepted(path, render, damage=mutated_text))) == COUNT


def test_pictures_that_are_none():
    """Damaged, and of very many pixels: a ValueError, which the page says."""
    import matplotlib.pyplot as plt
    from PIL import Image

    from qkd_jax.report import soft_label_figures

    axes = plt.figure().add_subplot()

    def draw(data):
        png = base64.b64encode(data).decode()
        soft_label_figures._thumbnail(axes, {"png": png, "why": "x", "label": 0}, ["a"])

    out = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(out, "png")
    draw(out.getvalue())
    rng = random.Random(0)
    for _ in range(COUNT):
        with contextlib.suppress(ValueError):
            draw(mutated(out.getvalue(), rng))
    large = io.BytesIO()
    Image.new("1", (4096, 1025)).save(large, "png")
    with pytest.raises(ValueError, match="a picture has 4096 x 1025 pixels"):
        draw(large.getvalue())
    plt.close("all")


def test_escapes_in_names_are_written_out(capsys):
    rows = [{"net": "a\x1b[31mred\u202e", "method": "x", "top1": 0.5, "loss": 1.0}]
    show({"experiment": "[bold]b[/bold]", "rows": rows}, printer(True))
    said = capsys.readouterr().out
    assert "a\\u001b[31mred\\u202e" in said and "[bold]b[/bold]" in said
    assert "\x1b" not in said and "\u202e" not in said
