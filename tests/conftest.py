"""For all tests: few threads, no network, the same random numbers each time, and tiny checkpoint files."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ldm.models.presets import SystemConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors gain nothing from threads
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same arithmetic on every machine


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test starts from the same global generator, alone or among others."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Looking up or connecting to any machine but this one fails the test that does it."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check_address(self.family, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check_address(self.family, address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        check_host(host)
        return getaddrinfo(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


def check_address(family: int, address: Any) -> None:
    if family in (socket.AF_INET, socket.AF_INET6):
        check_host(address[0])


def check_host(host: str | bytes | None) -> None:
    """Raise RuntimeError for a host that is not this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return
    try:
        local = ipaddress.ip_address(name).is_loopback
    except ValueError:
        local = False
    if not local:
        raise RuntimeError(f"tests use no network, but this one reaches for {name}")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SystemConfig], Path]:
    """tiny_file(config) -> a checkpoint of that config with random weights in float16, written once."""
    from ldm.pipeline.load import random_system, save_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    written: dict[SystemConfig, Path] = {}

    def write(config: SystemConfig) -> Path:
        import torch

        if config not in written:
            path = folder / f"{config.family}-{len(written)}.safetensors"
            save_checkpoint(random_system(config), path, dtype=torch.float16)
            written[config] = path
        return written[config]

    return write
