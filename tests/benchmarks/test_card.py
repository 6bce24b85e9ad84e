"""benchmarks.card, rehearsed at its small size: what a card will run must not fail there first."""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import machine
from benchmarks.card import __main__ as card
from benchmarks.card import attention, programs
from benchmarks.card.sizes import SIZES
from hiar_jax.attention import cudnn

SMALL = SIZES["small"]


def test_a_failing_program_leaves_the_others():
  def broken(x):
    raise RuntimeError("no plan\nsecond line")

  fill = lambda: (jnp.arange(3.0),)
  found = dict(
    programs.run(
      [
        programs.Program("before", lambda x: x + 1, fill, tflop=2.0, frames=6),
        programs.Program("broken", broken, fill),
        programs.Program("after", lambda w, x: w * x, fill, shared=lambda: jnp.ones(3)),
      ],
      seconds=60,
    )
  )
  assert found["broken"] == {"error": "RuntimeError: no plan"}
  assert found["before"]["tflop_per_s"] == pytest.approx(2.0 / found["before"]["run_s"])
  assert found["before"]["frames_per_s"] == pytest.approx(6 / found["before"]["run_s"])
  assert len(found["after"]["runs_s"]) == 4
  assert "no plan" in card.line("network", "broken", found["broken"])


def test_what_is_not_begun_in_time_is_said():
  program = programs.Program("late", lambda x: x, lambda: (jnp.ones(1),))
  assert dict(programs.run([program], seconds=0.0)) == {"late": {"error": "no time was left"}}


def test_a_donated_state_is_followed():
  count = programs.Program(
    "update", lambda w, x: (x + w, x), lambda: (jnp.zeros(()),), lambda: jnp.ones(()), donate=True
  )
  last = []
  count = dataclasses.replace(count, check=lambda out: last.append(float(out[0])) or {})
  dict(programs.run([count], seconds=60))
  assert last == [4.0]  # the first run and three timed ones


def test_a_package_that_is_lacking_is_no_error(monkeypatch):
  """safetensors comes with none of those that the card's programs need."""
  version = importlib.metadata.version

  def lacking(name):
    if name == "safetensors":
      raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(importlib.metadata, "version", lacking)
  found = machine.versions()
  assert found["jax"] == jax.__version__ and "safetensors" not in found


def in_one(q, k, v, query_seq_lengths=None, key_value_seq_lengths=None):
  """Stands for cuDNN's kernel, which runs on a card alone."""
  del query_seq_lengths
  shape = q.shape
  q, k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v))
  lengths = {"key_value_seq_lengths": key_value_seq_lengths}
  return jax.nn.dot_product_attention(q, k, v, implementation="xla", **lengths).reshape(shape)


@pytest.mark.slow
def test_forms_compute_what_their_case_says(monkeypatch):
  """By slices and by gathered frames, with another kernel: the float32 result within bfloat16's."""
  monkeypatch.setattr(cudnn, "_fused", in_one)
  forms = [p for p in attention.programs(SMALL) if "mask" not in p.name]
  found = dict(programs.run(forms, seconds=400))
  errors = {
    (name, key): value
    for name, figures in found.items()
    for key, value in figures.items()
    if key.endswith("_error")
  }
  assert sum(key == "value_error" for _, key in errors) == len(forms) - 9  # the exact ones
  assert max(errors.values()) < 0.01, errors


def rehearse(tmp_path, *options):
  out = tmp_path / "card.json"
  command = [sys.executable, "-m", "benchmarks.card", "--size=small", f"--out={out}", *options]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_one_program_from_the_command_line(tmp_path):
  report, printed = rehearse(tmp_path, "--parts=decoders", "--only=TAEHV, bfloat16/1")
  found = report["parts"]["decoders"]["programs"]
  assert list(found) == ["TAEHV, bfloat16/1 latent frames"]
  assert found["TAEHV, bfloat16/1 latent frames"]["frames_per_s"] > 0
  assert "TAEHV, bfloat16/1 latent frames" in printed
  assert report["parts"]["decoders"]["hardware"]["platform"] == "cpu"


@pytest.mark.slow
def test_every_part_at_the_small_size(tmp_path):
  """Whatever fails here would fail on the card, but for cuDNN's own kernel."""
  report, _ = rehearse(tmp_path, "--seconds=2000")
  failed = {
    (part, name): found["error"]
    for part, done in report["parts"].items()
    for name, found in done["programs"].items()
    if "error" in found
  }
  assert all("cudnn" in name for _, name in failed), failed
  assert set(failed.values()) == {"RuntimeError: cuDNN is not detected."}
  assert {part: len(done["programs"]) for part, done in report["parts"].items()} == {
    "attention": 33,
    "network": 8,
    "rollouts": 6,
    "decoders": 6,
    "updates": 4,
  }
