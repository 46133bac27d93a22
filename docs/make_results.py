"""Writes the tables of docs/results.md from the records of sweeps under results/.

    python docs/make_results.py                             # or `make pages`: fills the page
    python docs/make_results.py --take runs/qkd results/qkd # keeps a finished sweep's record first

A table stands between two markers, and what is between them is this script's:

    <!-- sweep results/qkd against QKD: results, differences-top1 -->
    <!-- end -->
    <!-- sweep results/quantizers: results of QAT -->  (the rows with this method alone)
    <!-- end -->

`results/<name>` holds what a sweep measured and nothing that only its machine knows: `sweep.json`
and of each run `config.json`, `results.json`, `metrics.jsonl.gz`, and of `run.json` the code,
versions, devices, data and nets. `--mode=report` takes a copy of such a folder as it takes the
sweep's own; for its learning curves the logs are unpacked (`gunzip`) first.
`tests/docs/test_results.py` fails where the page is not what this script writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkd_jax import checks
from qkd_jax.record.json_files import read_json, write_json
from qkd_jax.report.arms import SeedRun, read_runs
from qkd_jax.report.comparison import Comparison, compared_runs
from qkd_jax.report.comparison_tables import TextTable, tables
from qkd_jax.report.comparison_text import markdown_table
from qkd_jax.whole_files import replace_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
MARKED = re.compile(
    r"<!-- sweep (?P<folder>\S+)(?: against (?P<against>[^:]+))?: (?P<names>[^>]+?) -->\n"
    r"(?P<old>.*?)<!-- end -->",
    flags=re.S,
)
BEGUN = re.compile(r"<!--\s*sweep\b")  # a marker that is not written as it must be, too
# Of a start in run.json; the others are the machine's and the user's own.
KEPT = ("data", "devices", "git", "nets", "processor", "seed", "versions", "xla_flags")


def take(sweep: Path, record: Path) -> list[Path]:
    """Copies the record of a finished sweep.

    Args:
        sweep: the folder of a sweep, all of whose runs are done.
        record: where to; a folder that exists is refused.

    Returns:
        The files that were written.

    Raises:
        ValueError: no sweep, a run that is not done or whose code had uncommitted changes, or a
            record that is there.
    """
    planned = read_json(sweep / "sweep.json")
    if planned is None:
        raise ValueError(f"{sweep} has no sweep.json; give the --workdir of a sweep.")
    if record.exists():
        raise ValueError(f"{record} is there already; give another folder, or delete that one.")
    names = [run["name"] for run in planned["runs"]]
    found = {run.path.name: run for arm in read_runs(sweep).arms for run in arm.runs.values()}
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"runs of {sweep} are not done: {', '.join(missing)}; run the sweep again."
        )
    dirty = [n for n in names if "uncommitted" in found[n].environment.get("code", "")]
    if dirty:
        raise ValueError(
            f"nobody can find the code of {', '.join(dirty)}, which had uncommitted changes; "
            "commit, and run the sweep again."
        )
    written = [write_json(record / "sweep.json", planned)]
    for name in names:
        old, new = sweep / name, record / name
        for file in ("config.json", "results.json"):
            written.append(replace_file(new / file, (old / file).read_bytes()))
        log = gzip.compress((old / "metrics.jsonl").read_bytes(), mtime=0)
        written.append(replace_file(new / "metrics.jsonl.gz", log))
        starts = [
            {key: start[key] for key in KEPT if key in start}
            for start in read_json(old / "run.json")["starts"]
        ]
        written.append(write_json(new / "run.json", {"schema": 1, "starts": starts}))
    return written


def section(folder: str, against: str, names: Sequence[str]) -> str:
    """The text between two markers: on what the runs were made, what is to be said, the tables."""
    planned = read_json(ROOT / folder / "sweep.json")
    if planned is None:
        raise ValueError(
            f"a marker of docs/results.md names {folder}, which has no sweep.json; keep a sweep's "
            f"record there (--take <sweep> {folder}), or mend the name."
        )
    found = read_runs(ROOT / folder)
    comparison = compared_runs(found, against=against)
    runs = [run for arm in found.arms for run in arm.runs.values()]
    number = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    lines = [f"{number} of `{planned['config']}` ({environment(runs)})."]
    if comparison.notes:
        lines += ["", *(f"- {note}" for note in comparison.notes)]
    for name in names:
        lines += ["", markdown_table(chosen(comparison, *name.split(" of ", 1)))]
    return "\n".join(lines) + "\n"


def chosen(comparison: Comparison, name: str, method: str = "") -> TextTable:
    """The table of a name; with a method, its rows alone."""
    if method:
        checks.one_of("method", method, dict.fromkeys(row.method for row in comparison.rows))
        comparison = dataclasses.replace(
            comparison,
            rows=tuple(row for row in comparison.rows if row.method == method),
            compared={
                measure: tuple(pair for pair in pairs if pair.row.method == method)
                for measure, pairs in comparison.compared.items()
            },
        )
    made = {table.name: table for table in tables(comparison)}
    checks.one_of(f"table of {comparison.title}", name, made)
    return made[name]


def environment(runs: Sequence[SeedRun]) -> str:
    """Code, versions, devices and processor of runs: each once, or how many there are."""
    said: list[str] = []
    for name in ("code", "versions", "devices", "processor"):
        facts = dict.fromkeys(run.environment.get(name, "not recorded") for run in runs)
        said.append(", ".join(f"`{fact}`" if name == "code" else fact for fact in facts))
    return "; ".join(said)


def filled(page: str) -> str:
    """The page with the text of each pair of markers made anew.

    Raises:
        ValueError: a marker that begins and does not match, or names no table.
    """

    def fill(marked: re.Match[str]) -> str:
        against, names = marked["against"] or "", [n.strip() for n in marked["names"].split(",")]
        head = marked[0].partition("\n")[0]
        return f"{head}\n{section(marked['folder'], against, names)}<!-- end -->"

    made, count = MARKED.subn(fill, page)
    if count != (begun := len(BEGUN.findall(page))):
        raise ValueError(
            f"{begun} markers begin a table in docs/results.md and {count} of them are whole; "
            "write <!-- sweep results/<name> against <control>: <table>, <table> --> and, below "
            "it, <!-- end -->."
        )
    return made


def main(argv: Sequence[str] | None = None) -> Any:
    """Takes records, or fills the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--take", nargs=2, type=Path, metavar=("SWEEP", "RECORD"))
    given = parser.parse_args(argv)
    try:
        if given.take:
            written = take(*given.take)
            print(f"{len(written)} files, {sum(p.stat().st_size for p in written):,} bytes")
        else:
            replace_file(PAGE, filled(PAGE.read_text()).encode())
    except ValueError as error:
        sys.exit(f"make_results: {error}")


if __name__ == "__main__":
    main()
