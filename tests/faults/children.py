"""A job in a process of its own: killed at a moment that a seed chooses, held to a size of files, and what it said."""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from contextlib import suppress

import psutil

HANGS = 60.0  # seconds, of a job that takes one; a reader is given 10
WRITES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link")


def clear(error):
    """Whether an error is one of ours: a type that we raise, raised by the library, with something to do in it."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = f"{os.sep}mixdpo_lib{os.sep}" in last
    return type(error).__name__ in ("MixDPOError", "ValueError", "FileNotFoundError") and ours


def _counted(root, stop, log):
    """Count what is done to files under `root`; at number `stop` the process is killed."""
    seen = [0]

    def hook(event, args):
        if event not in WRITES or not args or not isinstance(args[0], (str, os.PathLike)):
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            if not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
                return
        path = os.fspath(args[0])
        if not path.startswith(root):
            return
        if log is not None:
            log.append(f"{event} {path}")
        if seen[0] == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    sys.addaudithook(hook)


def _child(job, base, folder, source, sink, stop, largest, events):
    """Do the job and write what came of it into the pipe."""
    os.setsid()
    os.close(source)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    log = [] if events else None
    said = {"ended": "done"}
    try:
        if stop is not None or events:
            _counted(str(folder), stop, log)
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        said["said"] = job(base, folder)
    except BaseException as error:
        said["ended"] = "clear" if clear(error) else "foreign"
        said["said"] = "".join(traceback.format_exception(error)[-4:])
    said["events"] = log
    content = json.dumps(said).encode()
    while content:
        content = content[os.write(sink, content) :]


def run(job, base, folder, *, stop=None, after=None, largest=None, seconds=HANGS, events=False):
    """Run a job in a child and say how it ended.

    stop : the number of the change to a file at which it is killed; after : seconds after which it is.
    largest : bytes that a file may have.

    Returns a dict: ended ("done", "clear", "foreign", "killed", "hang"), said, left (processes that live on), seconds,
    and with `events` what was done to files.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    source, sink = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _child(job, base, folder, source, sink, stop, largest, events)
        finally:
            os._exit(0)
    os.close(sink)
    until = began + (seconds if after is None else after)
    received = b""
    ended = False
    while not ended and (left := until - time.monotonic()) > 0:
        if select.select([source], [], [], left)[0]:
            part = os.read(source, 1 << 16)
            received, ended = received + part, not part
    took = time.monotonic() - began
    if not ended:
        for end in (os.kill, os.killpg):  # it may not have its group yet, or has just ended
            with suppress(ProcessLookupError):
                end(child, signal.SIGKILL)
    os.close(source)
    os.waitpid(child, 0)
    left = [
        one.pid for one in psutil.process_iter() if one.pid != child and _session(one.pid) == child
    ]
    for one in left:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    if received and ended:
        found = json.loads(received)
    else:
        found = {"ended": "killed" if stop is not None or after is not None else "hang", "said": ""}
    return {**found, "left": left, "seconds": took}


def _session(pid):
    try:
        return os.getsid(pid)
    except OSError:
        return None
