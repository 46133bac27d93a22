"""Settings for every test: CPU, strict broadcasting, a compilation cache of the tests' own."""

import os
import tempfile
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
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

# One folder for all workers and the processes that tests start. Set after JAX has read its
# environment: only what asks for the cache gets it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"qkd_jax-tests-xla-{os.getuid()}"),
)


def pytest_addoption(parser):
    parser.addoption(
        "--half",
        action="store_true",
        help="run every second test, chosen by a checksum of its name: a part of every subject",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--half"):
        chosen = [item for item in items if zlib.crc32(item.nodeid.encode()) % 2]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
