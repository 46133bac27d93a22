"""Settings for every test: CPU, strict broadcasting, a compilation cache of the tests' own."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Four host devices, set before JAX starts: parallel tests compare 4 devices with 1.
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()

import jax  # noqa: E402  (after the flags above)

jax.config.update("jax_numpy_rank_promotion", "raise")

# One folder for all workers and the processes that tests start. Set after JAX has read its
# environment: only what asks for the cache gets it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"qkd_jax-tests-xla-{os.getuid()}"),
)
