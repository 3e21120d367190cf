"""Two processes at once on one cache: one builds, the other waits; and when the first is killed, the other builds."""

import signal
import subprocess
import sys

CODE = """
import sys, time
from mixdpo_lib import store

def build(folder):
    array = store.large_array(folder / "a.npy", (1000, 4))
    print("building", flush=True)
    time.sleep(float(sys.argv[1]))
    array[:] = 1
    array.flush()

print(store.cached("stage", 1, {"x": 1}, build))
"""


def start(seconds):
    command = [sys.executable, "-c", CODE, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_who_waits_for_a_process_that_is_killed_builds_itself(project):
    first = start(600)
    assert first.stdout.readline() == "building\n"
    second = start(0)
    said = second.stderr.readline()  # after five seconds: the lock is the first one's
    assert "another process is making it" in said
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and out.startswith("building\n")
    (folder,) = [path for path in (project / "data/cache/stage").iterdir() if path.is_dir()]
    assert {path.name for path in folder.iterdir()} == {"a.npy", "artefact.json"}
