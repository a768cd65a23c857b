"""``accelerate launch`` with two processes, which stand for two accelerators on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TWO = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")
PLAIN = ("--mixed_precision", "no", "--dynamo_backend", "no")


def launch(*command: str, **environment: str) -> None:
    """Run ``command``, a script or a module and its arguments, in two processes, and see that both end well.

    What is aborted is begun anew, three times: torch's own threads abort a process in one of many runs ("terminate
    called without an active exception"), of those under FSDP in one of five, whatever the run does. A fault of ours
    would come back.
    """
    started = [str(Path(sys.executable).with_name("accelerate")), "launch", *TWO, *PLAIN, *command]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    for last in (False, False, False, True):
        done = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=850)
        said, _, summary = done.stderr.partition("ChildFailedError")
        if last or "SIGABRT" not in summary:
            break
        print(said[-3000:])
    assert done.returncode == 0, said[-6000:]
