"""A signal asks for a stop between two steps; a second Ctrl-C does not wait for it."""

import os
import signal

import pytest

from hiar_jax.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with Preemption():
    assert signal.getsignal(signal.SIGTERM) != before[0]
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
