"""The guard that all tests run under."""

from __future__ import annotations

import socket

import pytest


def test_other_machines_are_out_of_reach() -> None:
    with socket.socket() as connection, pytest.raises(RuntimeError, match=r"reaches for 192\.0\.2\.1"):
        connection.connect(("192.0.2.1", 80))
    with socket.socket(socket.AF_INET6) as connection, pytest.raises(RuntimeError, match="reaches for 2001:db8::1"):
        connection.connect_ex(("2001:db8::1", 80))
    with pytest.raises(RuntimeError, match=r"reaches for example\.org"):
        socket.create_connection(("example.org", 80))


def test_this_machine_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"x")
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1) == b"x"
