"""Trackers against the log: each of its lines once, however often a run was interrupted."""

import importlib.util
import io
import json
import shutil
import sys
import types

import numpy as np
import pytest
from memory_tracker import KEPT, MemoryTracker
from PIL import Image

from qkd_jax.record import trackers
from qkd_jax.record.metrics_log import MetricsLog, read_metrics

FIELDS = {"trackers": ("fake",), "project": "test"}


class Fake(MemoryTracker):
    """A tracker that looks at its options."""

    def __init__(self, folder, options):
        super().__init__(folder, options)
        assert options["project"] == "test"


def lines_of_a_killed_run(log):
    """Logs five lines of which a checkpoint saw two, then the same three again and one more."""
    log.truncate(0, lines=0)
    for again in (False, True):
        if again:
            log.truncate(20, lines=2)  # the second line of step 20 came behind the checkpoint
        else:
            log.log(10, "a", "train", {"net/loss": 1.0})
            log.log(20, "a", "train", {"net/loss": 0.5, "net/lr": float("nan")})
        log.log(20, "a", "test", {"net/top1": 0.25})
        log.log(30, "a", "codes", {"net/conv/-2": 3, "net/conv/1": 5})
        log.log(30, "a", "train", {"net/loss": 0.25})
    log.log(40, "b", "train", {"net/loss": 0.125})


def wanted(folder):
    return [trackers.points_of(row) for row in read_metrics(folder)]


def test_a_line_that_the_checkpoint_had_not_seen_is_there_once(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "fake", Fake)
    log = MetricsLog(tmp_path)
    with trackers.tracking(log, FIELDS, {}, print):
        lines_of_a_killed_run(log)
    found, _ = KEPT[str(tmp_path)]
    assert list(found) == list(range(6)) and list(found.values()) == wanted(tmp_path)
    assert found[1].scalars == {"train/net/loss": 0.5}  # what was not finite is no point
    assert found[3].histograms == {"codes/net/conv": (-2, (3, 0, 0, 5), 1)}


@pytest.mark.parametrize("moment", ["open", "begin", "add", "close"])
def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, moment):
    def fail(*_, **__):
        raise ConnectionError("no network")

    broken = type("Broken", (Fake,), {"__init__" if moment == "open" else moment: fail})
    monkeypatch.setitem(trackers.TRACKERS, "fake", broken)
    log, said = MetricsLog(tmp_path), []
    with trackers.tracking(log, FIELDS, {}, said.append):
        lines_of_a_killed_run(log)
    assert len(read_metrics(tmp_path)) == 6
    (text,) = said
    assert "fake failed (ConnectionError: no network); the run goes on" in text


def test_what_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "fake", Fake)
    log, said = MetricsLog(tmp_path), []
    with trackers.tracking(log, FIELDS, {}, said.append) as follower:
        log.truncate(0, lines=0)
        follower.images(0, 0, lambda: 1 // 0)
        follower.images(0, 0, lambda: {})
    with trackers.tracking(log, FIELDS, {}, said.append):
        log.log(10, "a", "codes", {"net/conv/none": 3})  # a name without a number
    assert [text.partition(":")[0] for text in said] == [
        "tracker fake failed (ZeroDivisionError",
        "tracker fake failed (ValueError",
    ]


def test_codes_of_16_bits_are_counted_in_bins_that_wandb_takes():
    ends = {"net/conv/-32768": 1, "net/conv/0": 5, "net/conv/32767": 2}
    found = trackers.points_of({"step": 1, "split": "codes", "values": ends})
    histogram = found.histograms["codes/net/conv"]
    counts, edges = histogram.counts, histogram.edges()
    assert len(counts) == 512 and sum(counts) == 8
    assert (counts[0], counts[256], counts[511]) == (1, 5, 2)
    assert (edges[0], edges[256], edges[512]) == (-32768.5, -0.5, 32767.5)


def test_a_copied_run_folder_is_a_run_of_its_own_and_a_moved_one_is_not(tmp_path, monkeypatch):
    server = {}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(server))

    def id_of(folder):
        fields = {"trackers": ("wandb",), "project": "test"}
        with trackers.tracking(MetricsLog(folder), fields, {}, print, group="seeds"):
            pass
        return json.loads((folder / "wandb.json").read_text())["id"]

    (tmp_path / "a").mkdir()
    first = id_of(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    second = id_of(tmp_path / "copy")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert id_of(tmp_path / "moved") == first != second == id_of(tmp_path / "copy")
    assert set(server) == {first, second}


def test_wandb_is_told_that_a_run_failed(tmp_path, monkeypatch):
    server = {}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(server))
    fields = {"trackers": ("wandb",), "project": "test"}
    with (
        pytest.raises(OSError, match="full"),
        trackers.tracking(MetricsLog(tmp_path), fields, {}, print, group="seeds"),
    ):
        raise OSError("full")
    assert list(server.values()) == [["exit 1"]]


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """wandb leaves a folder of its name where it ran."""
    (tmp_path / "left_behind").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "left_behind")
    with pytest.raises(ValueError, match="left_behind is not installed"):
        trackers.check_packages(("wandb",))


def test_names_and_packages_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="Did you mean 'tensorboard'"):
        trackers.check(("tensorbord",))
    with pytest.raises(ValueError, match="give a tuple of names"):
        trackers.check("wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="package tensorboardX is not installed; pip install"):
        trackers.check_packages(("tensorboard",))
    trackers.check_packages(())


def fake_wandb(server):
    """A module that keeps what it is sent, and refuses what the service would."""

    class Run:
        def __init__(self, id, resume, **options):
            assert resume == "allow" and options["project"] == "test"
            assert options["group"] == "seeds" and options["settings"]["init_timeout"] == 20
            self.sent = server.setdefault(id, [])
            self.offline = False
            self.step = self.sent[-1][0] + 1 if self.sent else 0  # as the service says

        def define_metric(self, *names, **options):
            pass

        def log(self, values, step):
            assert not self.sent or step > self.sent[-1][0], "steps go up"
            self.sent.append((step, values))

        def finish(self, exit_code):
            self.sent.append(f"exit {exit_code}") if exit_code else None

    module = types.ModuleType("wandb")
    module.init = Run
    module.Settings = module.Image = dict
    module.Histogram = lambda np_histogram: np_histogram
    return module


@pytest.mark.parametrize("lost", [0, 4])
def test_a_run_of_wandb_goes_on_with_its_id(tmp_path, monkeypatch, lost):
    server = {}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(server))
    fields = {"trackers": ("wandb",), "project": "test"}
    log = MetricsLog(tmp_path)
    with trackers.tracking(log, fields, {"seed": 1}, print, group="seeds"):
        lines_of_a_killed_run(log)
    if lost:  # handed over, and not sent yet when the process was killed
        del next(iter(server.values()))[-lost:]
    again = MetricsLog(tmp_path)  # another process, after the last line
    with trackers.tracking(again, fields, {"seed": 1}, print, group="seeds"):
        again.truncate(30, lines=4)
        again.log(30, "a", "train", {"net/loss": 0.25})
        again.log(40, "b", "train", {"net/loss": 0.125})
        again.log(50, "b", "train", {"net/loss": 0.1})
    ((id, sent),) = server.items()
    assert len(server) == 1 and json.loads((tmp_path / "wandb.json").read_text())["id"] == id
    assert [step for step, _ in sent] == list(range(7))
    assert sent[2][1] == {"test/net/top1": 0.25, "step": 20}
    counts, edges = sent[3][1]["codes/net/conv"]
    assert counts == [3, 0, 0, 5] and edges == [-2.5, -1.5, -0.5, 0.5, 1.5]


def test_a_tensorboard_that_looks_on_sees_a_restart(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX, an extra, is not installed")
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.plugin_event_multiplexer",
        reason="tensorboard, which reads the files here, is not installed",
    )
    fields, seen = {"trackers": ("tensorboard",), "project": ""}, []
    (tmp_path / "tensorboard").mkdir()
    looking = events.EventMultiplexer({"run": str(tmp_path / "tensorboard")})
    for kept, steps in ((0, (10, 20, 30)), (1, (20,)), (1, (20, 30, 40))):  # three in one second
        log = MetricsLog(tmp_path)
        with trackers.tracking(log, fields, {}, print):
            log.truncate(lines=kept)
            for step in steps:
                log.log(step, "a", "train", {"net/loss": 1.0})
            looking.Reload()
        seen.append([event.step for event in looking.Tensors("run", "train/net/loss")])
    assert seen == [[10, 20, 30], [10, 20], [10, 20, 30, 40]]


def test_tensorboard_reads_what_the_log_says(tmp_path):
    """With TensorBoard's own reader, which is another program than the writer."""
    pytest.importorskip("tensorboardX", reason="tensorboardX, an extra, is not installed")
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard, which reads the files here, is not installed",
    )
    log = MetricsLog(tmp_path)
    fields = {"trackers": ("tensorboard",), "project": ""}
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="png")
    with trackers.tracking(log, fields, {}, print) as follower:
        lines_of_a_killed_run(log)
        follower.images(6, 40, lambda: {"report/curves": png.getvalue()})
    reader = events.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    for tag, steps in {"train/net/loss": [10, 20, 30, 40], "test/net/top1": [20]}.items():
        found = [(e.step, e.value) for e in reader.Scalars(tag)]
        assert [step for step, _ in found] == steps
    assert [e.value for e in reader.Scalars("train/net/loss")] == [1.0, 0.5, 0.25, 0.125]
    (event,) = reader.Histograms("codes/net/conv")
    histogram = event.histogram_value
    assert event.step == 30 and list(histogram.bucket) == [3, 0, 0, 5] and histogram.num == 8
    # The ends of the first and the last bin, whose codes are in their middles as all others are.
    assert (histogram.min, histogram.max) == (-2.5, 1.5)
    assert list(histogram.bucket_limit) == [-1.5, -0.5, 0.5, 1.5]
    (image,) = reader.Images("report/curves")
    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    np.testing.assert_array_equal(shown, pixels)
