"""Drawing a picture opens no socket: in a process where every socket is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ldm.models.presets import small, tiny

ROOT = Path(__file__).parents[1]

BLOCKED = """
import socket, sys

def refuse(*arguments, **options):
    raise RuntimeError(f"a socket was asked for: {arguments}")

class Refusing(socket.socket):
    __init__ = refuse

socket.socket = Refusing
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
from ldm.apps.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_generating_opens_no_socket(tiny_file, tmp_path):
    model = tiny_file(tiny(small()))
    command = [sys.executable, "-c", BLOCKED, "generate", "épée", "a red apple", "--model", str(model), "--steps", "2"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    answer = subprocess.run(
        command, cwd=tmp_path, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_the_block_works():
    probe = BLOCKED.replace("from ldm.apps.cli import main\n", "").replace(
        "sys.exit(main(sys.argv[1:]))", "socket.socket()"
    )
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert answer.returncode == 1 and "a socket was asked for" in answer.stderr
