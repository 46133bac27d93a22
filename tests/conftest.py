"""Settings for every test: CPU, strict broadcasting, and no reuse of a random key."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Four host devices, set before JAX starts: parallel tests compare 4 devices with 1.
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()

import jax  # noqa: E402  (after the flags above)

jax.config.update("jax_numpy_rank_promotion", "raise")
