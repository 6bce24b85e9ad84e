"""The benchmark of excess precision: what it compares, and the command at a small size."""

import pathlib
import types

import numpy as np
import pytest

from benchmarks import precision
from hiar_jax.errors import UserError
from tests.helpers.benchmark_reports import report_of


def found(forward, update, times) -> dict[str, np.ndarray]:
  """What `compute` returns; update: what the updates add to weights of 100."""
  before = np.full(4, 100, np.float32)
  update = before + np.asarray(update, np.float32)
  forward = np.asarray(forward, np.float32)
  return {"forward": forward, "before": before, "update": update, "times": np.asarray(times)}


def test_each_is_measured_by_its_own_scale():
  """Velocities by themselves, weights by what the updates changed of them: of one device."""
  one = found([4, -4, 4, -4], [2, -2, 2, -2], [0.5, 0.1, 0.2])
  several = found([4, -4, 4, -3], [2, -1, 2, -1], [9, 9, 9])
  assert precision.compared(one, several) == {
    "forward": {"bit_equal": 0.75, "apart": 0.125},
    "update": {"bit_equal": 0.5, "apart": 0.354},
    "update_s": 0.2,
  }
  same = {"bit_equal": 1.0, "apart": 0.0}
  assert precision.compared(one, one) == {"forward": same, "update": same, "update_s": 0.2}


@pytest.mark.parametrize("excess", [True, False])
def test_a_process_has_its_setting_its_devices_and_the_callers_flags(excess, monkeypatch):
  asked = []

  def run(command, env, check):
    assert check and command[1:4] == ["-m", "benchmarks.precision", "--updates=2"]
    given = [*command[4:], *env["XLA_FLAGS"].split()]
    asked.append(dict(word.removeprefix("--").split("=") for word in given))
    assert env["JAX_NUM_CPU_DEVICES"] == "3"
    np.savez(asked[0]["write"], forward=np.arange(3))

  monkeypatch.setattr(precision, "subprocess", types.SimpleNamespace(run=run))
  monkeypatch.setattr(precision.sys, "argv", ["precision.py", "--updates=2"])
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  np.testing.assert_array_equal(precision.in_process(excess, 3)["forward"], np.arange(3))
  (said,) = asked
  assert not pathlib.Path(said.pop("write")).exists()
  assert said == {
    "devices": "3",
    "xla_cpu_enable_fast_math": "false",
    "xla_allow_excess_precision": str(excess).lower(),
  }


def test_fewer_devices_than_asked_for_are_no_comparison():
  with pytest.raises(UserError, match=r"^--devices=100: there are \d+$"):
    precision.compute(None, devices=100, updates=1)


@pytest.mark.slow
def test_both_settings_are_compared():
  """Forwards of a clip are alike on any device; an update's gradient is summed in another order."""
  report = report_of(
    "precision",
    "--config=experiments/shapes.py:smoke",
    "--config.model.dtype=bfloat16",
    "--config.model.num_layers=1",
    "--config.causal_init.batch=4",
    "--devices=2",
    "--updates=2",
  )
  found = report["excess_precision"]
  assert list(found) == ["true", "false"]
  for setting in found.values():
    forward, update = setting["forward"], setting["update"]
    assert setting["update_s"] > 0 and forward["bit_equal"] > 0.9 and forward["apart"] < 0.01
    # equal to the last bit they would be of one device
    assert 0.1 < update["bit_equal"] < 1 and 0 < update["apart"] < 0.05
  assert found["true"]["update"] != found["false"]["update"]  # the flag is heard
  assert found["false"]["forward"]["apart"] <= found["true"]["forward"]["apart"]
