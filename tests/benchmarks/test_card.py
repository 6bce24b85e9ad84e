"""benchmarks.card, rehearsed at its small size: what a card will run must not fail there first."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.card import __main__ as card
from benchmarks.card import attention, programs
from benchmarks.card.sizes import SIZES

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


def in_chunks(q, k, v, query_seq_lengths=None, key_value_seq_lengths=None):
  """Stands for cuDNN's kernel, which runs on a card alone."""
  del query_seq_lengths
  b, f, t, a, d = q.shape
  q, k, v = (x.reshape(b, -1, a, d) for x in (q, k, v))
  lengths = {"key_value_seq_lengths": key_value_seq_lengths}
  out = jax.nn.dot_product_attention(q, k, v, implementation="xla", **lengths)
  return out.reshape(b, f, t, a, d)


@pytest.mark.slow
def test_forms_compute_what_their_case_says(monkeypatch):
  """By slices and by gathered frames, with another kernel: the float32 result within bfloat16's."""
  monkeypatch.setattr(attention, "fused", in_chunks)
  forms = attention.programs(SMALL)
  wanted = [p.name for p in forms if p.name.endswith(("/cudnn, slices", "/cudnn, gathered"))]
  exact = {f"{name.split('/')[0]}/float32" for name in wanted}
  chosen = [p for p in forms if p.name in exact or p.name in wanted]
  found = dict(programs.run(chosen, seconds=200))
  errors = {
    (name, key): value
    for name, figures in found.items()
    for key, value in figures.items()
    if key.endswith("_error")
  }
  assert sum(key == "value_error" for _, key in errors) == 4  # two by slices, two gathered
  assert max(errors.values()) < 0.01, errors


def test_runs_of_frames_are_unmasked_attention():
  mask = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]], bool)
  seen = []

  def attend(q, k, v):
    seen.append((q.shape[1], k[0, :, 0, 0, 0].tolist()))
    return q

  frames = jnp.arange(4.0).reshape(1, 4, 1, 1, 1)
  out = attention.by_runs(frames[:, :3], frames, frames, mask, attend)
  assert seen == [(2, [0, 2]), (1, [0, 1, 2, 3])]
  assert out.shape[1] == 3


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
    "attention": 39,
    "network": 8,
    "rollouts": 6,
    "decoders": 6,
    "updates": 4,
  }
