"""The tables of the results page are those of the records, and a record is that of its sweep."""

from __future__ import annotations

import gzip
import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make_results() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(make_results):
    page = make_results.PAGE.read_text()
    assert make_results.MARKED.search(page)
    assert page == make_results.filled(page), "run `make pages`"


def test_a_number_of_the_page_by_hand(make_results):
    tops = []
    for seed in range(8):
        rows = json.loads((ROOT / f"results/qkd/seed-{seed}/results.json").read_text())["rows"]
        tops += [100 * row["top1"] for row in rows if row["method"] == "QKD"]
    # 2.3646 is the 97.5 % point of Student's t with 7 degrees of freedom.
    sd = np.std(tops, ddof=1)
    cell = f"{np.mean(tops):.2f} ± {2.3646 * sd / 8**0.5:.2f} ({sd:.2f})"
    assert f"| student | QKD | 8 | {cell} |" in make_results.PAGE.read_text()


def test_a_marker_that_is_not_whole_is_refused(make_results):
    begun = "<!-- sweep results/qkd: results -->\ntext"
    with pytest.raises(ValueError, match=r"1 markers begin a table .* and 0 of them are whole"):
        make_results.filled(begun)
    with pytest.raises(ValueError, match=r"1 markers begin .* and 0 of them are whole"):
        make_results.filled("<!--sweep results/qkd: results -->\n<!-- end -->")
    with pytest.raises(ValueError, match=r"names results/none, which has no sweep\.json"):
        make_results.filled("<!-- sweep results/none: results -->\n<!-- end -->")
    with pytest.raises(ValueError, match=r"table of qkd.*'result'.*results"):
        make_results.filled(begun.replace("results -->", "result -->") + "<!-- end -->")


def sweep(folder: Path, *, done: bool = True, dirty: bool = False) -> Path:
    """A sweep of two runs, copied by hand from a record, with what a machine adds to it."""
    for seed in (0, 1):
        old, new = ROOT / "results" / "qkd" / f"seed-{seed}", folder / f"seed-{seed}"
        new.mkdir(parents=True)
        record = json.loads((old / "run.json").read_text())
        record["starts"][0] |= {"hostname": "mine", "argv": ["/home/me/launch.py"]}
        record["starts"][0]["git"]["dirty"] = dirty
        (new / "run.json").write_text(json.dumps(record))
        (new / "config.json").write_bytes((old / "config.json").read_bytes())
        log = gzip.decompress((old / "metrics.jsonl.gz").read_bytes())
        (new / "metrics.jsonl").write_bytes(log)
        if done or seed == 0:
            (new / "results.json").write_bytes((old / "results.json").read_bytes())
    runs = [{"name": f"seed-{seed}", "overrides": {"seed": seed}} for seed in (0, 1)]
    plan = {"config": "configs/qkd.py:seeds=2", "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


def test_a_record_is_the_sweep_without_its_machine(make_results, tmp_path):
    written = make_results.take(sweep(tmp_path / "runs"), tmp_path / "record")
    assert len(written) == 1 + 2 * 4
    for path in written[1:]:
        kept = ROOT / "results" / "qkd" / path.relative_to(tmp_path / "record")
        # The same log may be packed into other bytes by another Python.
        read = gzip.decompress if path.suffix == ".gz" else bytes
        assert read(path.read_bytes()) == read(kept.read_bytes())
    before = {path: path.read_bytes() for path in written}
    with pytest.raises(ValueError, match="there already"):
        make_results.take(tmp_path / "runs", tmp_path / "record")
    assert before == {path: path.read_bytes() for path in written}


def test_what_is_no_finished_sweep_is_refused(make_results, tmp_path):
    with pytest.raises(ValueError, match=r"no sweep\.json"):
        make_results.take(tmp_path, tmp_path / "record")
    with pytest.raises(ValueError, match="not done: seed-1"):
        make_results.take(sweep(tmp_path / "half", done=False), tmp_path / "record")
    with pytest.raises(ValueError, match="seed-0, seed-1, which had uncommitted changes"):
        make_results.take(sweep(tmp_path / "dirty", dirty=True), tmp_path / "record")
    assert not (tmp_path / "record").exists()
