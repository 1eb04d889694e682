"""For tests of training."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save waits until it is on the disk, which a test that cuts no power need not do."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
