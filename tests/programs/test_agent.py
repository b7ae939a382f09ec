"""The exit status and the line of an agent whose worker was killed."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

WORKER = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {end}
time.sleep(60)
"""


@pytest.mark.parametrize(
    "end, status, what",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, "was ended by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV, "was ended by SIGSEGV"),
        ("sys.exit(3)", 3, "ended with status 3"),
    ],
)
def test_agent_has_the_status_of_the_worker_that_ended_first(tmp_path, end, status, what):
    (tmp_path / "worker.py").write_text(WORKER.format(end=end))
    agent = [sys.executable, ROOT / "launcher" / "launch.py", "agent"]
    words = [*agent, "--standalone", "--nproc_per_node=2", tmp_path / "worker.py"]
    reader, writer = os.pipe()  # the agent ends when its standard input is closed
    run = subprocess.run(
        [str(word) for word in words], stdin=reader, text=True, capture_output=True, timeout=120
    )
    os.close(reader), os.close(writer)
    assert run.returncode == status, run.stderr
    assert f"launch: process 1 {what} on " in run.stderr
