"""Being asked to stop."""

import signal
import subprocess
import sys

import pytest

ASKED = """
import os, signal, sys
from pretrain.stop import StopRequest
stop = StopRequest()
stop.begin()
assert not stop.asked
os.kill(os.getpid(), int(sys.argv[1]))
assert stop.asked
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_only_noted(number: signal.Signals) -> None:
    words = [sys.executable, "-c", ASKED, str(int(number))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
