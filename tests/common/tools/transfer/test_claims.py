"""Test that one process alone has a run, and that the claim of a dead one is taken over."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from common.tools.transfer import claims

ASK = """
import sys
from pathlib import Path
from common.tools.transfer.claims import claim
print(claim(Path(sys.argv[1])))
"""
HOLD = """
import fcntl, signal, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print(1, flush=True)
time.sleep(60)
"""


def asked_by_another(path: Path) -> str:
    done = subprocess.run([sys.executable, "-c", ASK, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_claim_holds_against_others_until_it_is_released(tmp_path):
    path = tmp_path / "run.claim"
    ours = claims.claim(path)
    assert ours is not None
    assert claims.claim(path) is None
    assert json.loads(path.read_text())["process"] == os.getpid()
    assert asked_by_another(path) == "None"
    ours.release()
    assert not path.exists()


def test_the_claim_of_a_dead_process_is_taken_over_at_once(tmp_path):
    path = tmp_path / "run.claim"
    assert "Claim object" in asked_by_another(path)  # it ended without a release, as after SIGKILL
    assert json.loads(path.read_text())["process"] != os.getpid()
    ours = claims.claim(path)
    assert ours is not None
    assert not ours.lost()
    ours.release()


def test_a_process_with_the_number_of_a_dead_one_is_told_apart(tmp_path):
    path = tmp_path / "run.claim"
    path.write_text(json.dumps(claims._ours() | {"started": "1"}))
    assert claims.is_stale(path)


def test_a_claim_of_another_machine_is_stale_when_its_time_stands_still(tmp_path):
    path = tmp_path / "run.claim"
    path.write_text(json.dumps(claims._ours() | {"host": "elsewhere"}))
    assert claims.claim(path) is None
    before = time.time() - claims.STALE - 5
    os.utime(path, (before, before))
    ours = claims.claim(path)
    assert ours is not None
    path.write_text(json.dumps(claims._ours() | {"host": "elsewhere"}))  # taken over while this machine slept
    assert ours.lost()
    ours.release()
    assert path.exists()


def test_a_claim_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    path = tmp_path / "run.claim"
    ours = claims.claim(path)
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 20
    while path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.stat().st_mtime > 0
    ours.release()


def test_an_empty_claim_is_stale_after_a_while(tmp_path):
    path = tmp_path / "run.claim"
    path.touch()
    assert not claims.is_stale(path)
    os.utime(path, (0, 0))
    assert claims.is_stale(path)


def test_a_run_that_outlived_its_command_is_stopped(tmp_path):
    lock, other = tmp_path / ".lock", tmp_path / "other"
    orphan = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    orphan.stdout.readline()
    lock.write_text(f"process {orphan.pid} on {claims.socket.gethostname()}\n")
    other.mkdir()
    shutil.copy(lock, other)  # names the process, which does not hold it
    claims.end_orphan(other)
    assert orphan.poll() is None
    waiter = threading.Thread(target=orphan.wait)  # reaps the process, as init does with an orphan
    waiter.start()
    claims.end_orphan(tmp_path)
    waiter.join()
    assert orphan.returncode == 143
