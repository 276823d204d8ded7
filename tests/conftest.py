"""One strict setting for every test: 8 virtual CPU devices, no implicit rank promotion, no network.

Warnings are errors by pyproject.toml.
"""

import os
import socket

# Before JAX starts: the tests' meshes need 8 devices wherever they run.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compile many programs and run each a few times: plain code halves their time.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


class NetworkRefusedError(RuntimeError):
    """A test tried to reach the network."""


@pytest.fixture(autouse=True)
def _refuse_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections beyond this machine; worker processes talk over AF_UNIX or loopback."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise NetworkRefusedError(f"tests run offline, but something connected to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
