"""podspan doctor --self-test, with the real programs."""

import json
import subprocess
import sys


def test_the_self_test_says_what_the_kernel_engine_does_here():
    done = subprocess.run(
        [sys.executable, "-m", "podspan.agent", "doctor", "--self-test", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert said["self-test"]["level"] in {"ok", "warn"}
    assert done.stderr == ""
