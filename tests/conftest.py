"""Eight host devices for every test, whether or not there is an accelerator."""

import os
from importlib import metadata

flags = ["--xla_force_host_platform_device_count=8"]
if metadata.version("jaxlib").startswith("0.10."):
    # The tests compile hundreds of tiny programs, several times faster so, and the same HLO.
    # Not for unknown versions: XLA aborts on a flag that it does not know.
    flags += [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",  # one LLVM module for a program, not many
    ]
# Read once, when JAX starts its backend: before anything imports JAX.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def float64():
    """One test in float64; nothing is switched for the others."""
    with jax.enable_x64(True):
        yield
