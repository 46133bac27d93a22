"""A disk that is really full: one line and exit code 74, nothing lost, and the run goes on."""

import os
import shutil
import subprocess

import pytest
from tiny_config import get_config

from qkd_jax import experiment


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MB of its own."""
    if os.getuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "qkd_jax-test", path]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk, free):
    """Writes a file that leaves so many bytes of the disk."""
    space = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(space.f_bavail * space.f_frsize - free, 0)))


def used(folder):
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*"))


@pytest.mark.slow  # it runs an experiment twice, the second time in three parts
def test_a_full_disk_ends_a_run_that_goes_on_with_room(disk, tmp_path, capsys, caplog):
    config = get_config("steps=4")
    experiment.run(config, tmp_path / "whole", report=False, verbose=False)
    wanted = (tmp_path / "whole" / "results.json").read_bytes()
    folder = disk / "run"
    # A disk on which nothing can be written, and one on which the first checkpoints can.
    for share in (0, 0.5):
        fill(disk, int(share * used(tmp_path / "whole")))
        code = experiment.main("run", config=config, workdir=folder)
        *_, said = capsys.readouterr().err.strip().splitlines()  # behind those of the progress
        (disk / "ballast").unlink()
        assert code == 74 and not caplog.records, "nothing but that line"
        assert said.startswith("error: ") and "No space left on device" in said
        assert str(folder) in said and "goes on from its newest checkpoint" in said
    assert experiment.main("run", config=config, workdir=folder) == 0
    assert (folder / "results.json").read_bytes() == wanted
    log, logged = ((at / "metrics.jsonl").read_bytes() for at in (folder, tmp_path / "whole"))
    assert log == logged
    assert not list(folder.rglob(".*.tmp"))
