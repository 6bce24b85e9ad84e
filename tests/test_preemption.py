"""A signal asks for a stop between two steps; a second Ctrl-C does not wait for it."""

import os
import pty
import signal
import subprocess
import sys

import jax
import pytest

from hiar_jax.preemption import Preemption


@pytest.fixture(autouse=True)
def hang_up():
  """SIGHUP as in a terminal: where the tests run under nohup it is ignored, also by children."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_asks_for_a_stop(number, capfd):
  with Preemption() as stop:
    assert not stop.requested(1)
    os.kill(os.getpid(), number)
    assert stop.requested(2) and stop.requested(3)
  assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_a_second_interrupt_aborts(capfd):
  with pytest.raises(KeyboardInterrupt), Preemption() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested(1)
    os.kill(os.getpid(), signal.SIGINT)
    stop.requested(2)
  assert "press Ctrl-C again to abort" in capfd.readouterr().err


def test_a_termination_after_an_interrupt_still_waits():
  with Preemption() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested(1)


def test_afterwards_signals_do_what_they_did():
  before = [signal.getsignal(number) for number in STOPS]
  with Preemption():
    assert all(map(signal.getsignal, STOPS)) and signal.getsignal(signal.SIGTERM) != before[0]
  assert [signal.getsignal(number) for number in STOPS] == before


def test_nohup_is_heeded():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with Preemption() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop.requested(1)
  finally:
    signal.signal(signal.SIGHUP, before)


def test_of_several_processes_the_service_is_told(monkeypatch):
  """It watches SIGTERM, and makes all of them stop after the same step."""
  told = []
  before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
  try:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with Preemption():
      os.kill(os.getpid(), signal.SIGUSR1)
      os.kill(os.getpid(), signal.SIGHUP)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert told == [signal.SIGTERM, signal.SIGTERM]


ON_A_TERMINAL = """
import sys, time
from hiar_jax.preemption import Preemption
with Preemption() as stop:
  print("ready", file=sys.stderr, flush=True)
  while not stop.requested(1):
    time.sleep(0.01)
print("stopped and saved", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("saved")
"""


def test_a_closed_terminal_does_not_keep_it_from_saving(tmp_path):
  """What is printed then would raise EIO, in the handler and behind it."""
  ours, theirs = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path / "out")],
    stdin=theirs,
    stdout=theirs,
    stderr=theirs,
  )
  os.close(theirs)
  assert b"ready" in os.read(ours, 1000)
  os.close(ours)
  process.send_signal(signal.SIGHUP)
  assert process.wait(60) == 0
  assert (tmp_path / "out").read_text() == "saved"


INTERRUPTED = """
import threading, time
from hiar_jax.config import command_line

def late():
  time.sleep(1)
  print("late", flush=True)

def main():
  print("begun")
  threading.Thread(target=late).start()
  raise KeyboardInterrupt

command_line.run_flags(main)
"""


def test_ctrl_c_waits_for_no_thread():
  """One that compiles would crash with the interpreter's end, or hold it up."""
  command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED]
  done = subprocess.run(command, capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (130, "begun\n", "interrupted\n")
