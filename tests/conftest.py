"""What all tests share: one thread each, because they run side by side."""

import socket

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that reaches for the network."""

    def connect(*_: object) -> None:
        pytest.fail("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
