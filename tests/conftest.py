"""Settings for every test: CPU, strict broadcasting, a compilation cache of the tests' own."""

import os
import sys
import tempfile
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# jaxlib 0.10 prints an error for each program that comes from the cache (openxla/xla issue 44565).
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# OpenVINO's telemetry forks the process, which JAX's threads do not survive for sure.
sys.modules["openvino_telemetry"] = None
# Four host devices, set before JAX starts: parallel tests compare 4 devices with 1.
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()

# pytest makes errors of warnings in its own processes (pyproject.toml); in programs that tests
# start, deprecations are errors too. The last is ml_collections', which loads config files.
os.environ["PYTHONWARNINGS"] = ",".join(
    [
        "error::DeprecationWarning",
        "error::PendingDeprecationWarning",
        "error::FutureWarning",
        "ignore:the load_module:DeprecationWarning",
    ]
)

import jax  # noqa: E402  (after the flags above)

jax.config.update("jax_numpy_rank_promotion", "raise")

# One folder for all workers, the processes that tests start, and the next run: half of the tests'
# time goes into compiling, and the same small programs come again and again.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"qkd_jax-tests-xla-{os.getuid()}"),
)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        type=int,
        default=1,
        metavar="N",
        help="run every Nth test, chosen by a checksum of its name: some of every subject",
    )


def pytest_collection_modifyitems(config, items):
    part = config.getoption("--part")
    left = [item for item in items if zlib.crc32(item.nodeid.encode()) % part]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % part == 0]
