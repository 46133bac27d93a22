"""Files of a run folder are whole, and no link leads a write out of the folder."""

import errno
import os
import threading
from pathlib import Path

import pytest

from qkd_jax.record.folder import RunFolder
from qkd_jax.record.json_files import read_json, write_json
from qkd_jax.record.metrics_log import MetricsLog, read_metrics
from qkd_jax.whole_files import append, remove_temporaries, replace_file, temporary


@pytest.fixture
def victim(tmp_path):
    """A file outside of the run folder that nothing may change."""
    path = tmp_path / "victim"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["results.json", ".results.json.tmp", "report.html", ".report.html.tmp"]
)
def test_a_link_is_replaced_and_not_followed(tmp_path, victim, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(victim)
    written = replace_file(folder / name.removeprefix(".").removesuffix(".tmp"), b"new")
    assert written.read_bytes() == b"new" and not written.is_symlink()


def test_logs_and_locks_that_are_links_are_refused(tmp_path, victim):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", ".lock"):
        (folder / name).symlink_to(victim)
    MetricsLog(folder).log(1, "stage", "train", {})  # "mine" is no line: the log starts anew
    (folder / "metrics.jsonl").rename(tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    (folder / "metrics.jsonl").symlink_to(tmp_path / "log")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is a symbolic link"):
        MetricsLog(folder).log(2, "stage", "train", {})
    assert (tmp_path / "log").read_bytes() == whole
    with pytest.raises(ValueError, match=r"\.lock is a symbolic link"):
        RunFolder(folder).lock()


def test_modes_are_those_of_any_new_file(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    replace_file(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_device_is_written_to():
    before = os.stat("/dev/null")
    replace_file("/dev/null", b"data")
    assert os.stat("/dev/null").st_rdev == before.st_rdev


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        replace_file(path, "text")
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_many_writers_and_an_owner_that_tidies(tmp_path):
    """The owner's start may remove a temporary file at any moment; the write is repeated."""
    path, stop = tmp_path / "a.json", threading.Event()

    def tidy():
        while not stop.is_set():
            remove_temporaries(tmp_path)

    def write(value):
        for _ in range(50):
            write_json(path, {"value": [value] * 1000})

    tidying = threading.Thread(target=tidy)
    writers = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in (tidying, *writers):
        thread.start()
    for _ in range(200):
        found = read_json(path)
        assert found is None or len(set(found["value"])) == 1
    for thread in writers:
        thread.join()
    stop.set()
    tidying.join()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_owner_removes_what_killed_writers_left(tmp_path):
    (tmp_path / ".results.json.0123abcd.tmp").write_text("{")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".net.onnx.0123abcd.tmp").write_text("{")
    RunFolder(tmp_path)
    assert len(list(tmp_path.rglob(".*.tmp"))) == 2, "looking at a folder changes nothing"
    with RunFolder(tmp_path) as folder:
        folder.lock()
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds a JSON list"),
        ("1", "holds a JSON int"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' * 100_000, "nested too deep"),
        (b"\xff\xfe", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_json_that_is_not_a_record(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"results\.json {message}|results\.json is {message}"):
        read_json(path)


def test_a_folder_or_a_pipe_in_place_of_a_file(tmp_path):
    (tmp_path / "results.json").mkdir()
    os.mkfifo(tmp_path / "run.json")
    os.mkfifo(tmp_path / "metrics.jsonl")
    for name in ("results.json", "run.json"):
        with pytest.raises(ValueError, match=rf"{name} is no file"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is no file"):
        read_metrics(tmp_path)


def test_errors_of_a_full_disk_name_the_file(tmp_path):
    """The system's own error of a write knows no name; /dev/full is a disk without room."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        append(Path("/dev/full"), b"data")
    assert error.value.filename == "/dev/full"
    with pytest.raises(OSError) as error, temporary(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "a.json") and not list(tmp_path.iterdir())
