"""The example for several processes: two of them train what one does."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.repository import ROOT


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(output, arguments, process, count, port, devices):
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        # The last of two equal flags holds.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "NUM_PROCESSES": str(count),
        "PROCESS_ID": str(process),
        "COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    }
    command = [sys.executable, str(ROOT / "examples/distributed.py"), "--output", str(output)]
    return subprocess.Popen(
        [*command, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(output, arguments, count, devices):
    """The example in ``count`` processes; the parameters that the first one saved."""
    port = free_port()
    processes = [start(output, arguments, i, count, port, devices) for i in range(count)]
    try:
        for process in processes:
            out, _ = process.communicate(timeout=180)
            assert process.returncode == 0, out
    finally:
        for process in processes:
            process.kill()
            process.wait()
    with np.load(output) as saved:
        return dict(saved)


@pytest.mark.parametrize("arguments", [[], ["--shard-params"]], ids=str)
def test_two_processes_train_as_one(arguments, tmp_path):
    arguments = ["--steps", "20", *arguments]
    two = run(tmp_path / "two.npz", arguments, count=2, devices=2)
    one = run(tmp_path / "one.npz", arguments, count=1, devices=1)
    start_params = run(tmp_path / "start.npz", ["--steps", "0"], count=1, devices=1)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-5)
        assert np.max(np.abs(one[name] - start_params[name])) > 1e-2
