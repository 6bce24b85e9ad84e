"""Recordings of the published implementation, streamed on 1, 2, 4 and 8 devices: windows, sinks,
continuation, clean context.
"""

import jax
import numpy as np
import pytest

from hiar_jax.streaming.compiled_tick import CompiledPipeline, Engine, StreamParts, TickOptions
from hiar_jax.streaming.layout import Layout
from tests.helpers import golden_cases
from tests.helpers.golden_cases import assert_close, channels_last, noise_table
from tests.helpers.tiny_stream import quick_engine

NO_WINDOW = 12  # latent frames, more than any recording has
WINDOW, SINK, GIVEN, CLEAN = (
  ("dit_small", "rollout_step_first_window6_sink0"),
  ("dit_framewise", "rollout_step_first_window3_sink1"),
  ("dit_small", "continuation_step_first"),
  ("dit_small", "rollout_step_first_clean_context"),
)
ON = [
  *(
    (WINDOW, sizes) for sizes in ((1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (4, 2, 1), (2, 4, 1))
  ),
  *((SINK, sizes) for sizes in ((1, 1, 1), (1, 1, 2), (2, 1, 2), (4, 1, 2))),
  *((GIVEN, sizes) for sizes in ((2, 1, 1), (4, 2, 1))),
  (CLEAN, (4, 2, 1)),
]
QUICK = ((SINK, (4, 1, 2)),)
CASES = [
  pytest.param(
    *recording,
    Layout(*sizes),
    marks=() if (recording, sizes) in QUICK else pytest.mark.slow,
    id=f"{recording[1]}-{sizes}",
  )
  for recording, sizes in ON
  # HIAR_GOLDEN_DIR may have others
  if (golden_cases.ROOT / recording[0] / f"{recording[1]}.npz").exists()
]


class Recording:
  def __init__(self, case: golden_cases.Case, file: str):
    self.case, self.file, self.z = case, file, case.load(f"{file}.npz")
    self.sigmas = golden_cases.levels(self.z["denoising_timesteps"])

  @property
  def given(self) -> np.ndarray | None:
    return channels_last(self.z["initial_latent"]) if "initial_latent" in self.z else None

  @property
  def parts(self) -> StreamParts:
    rolled = self.case.sizes if "window" in self.file else {}
    row = self.case.history(
      level="clean" if "clean_context" in self.file else "output",
      window=rolled.get("window", NO_WINDOW),
      sink=rolled.get("sink", 0),
    )
    size, levels = (
      channels_last(self.z["latents"]).shape[2:4],
      tuple(float(sigma) for sigma in self.sigmas),
    )
    return StreamParts(
      self.case.config,
      row,
      levels,
      self.case.params("generator"),
      jax.random.key(0),
      size,
      texts=None,
      identity="recorded",
    )

  def noise_table(self, first: int) -> np.ndarray:
    """[level, block ...], the given blocks counted."""
    table = noise_table(
      self.z["noise"], self.z.get("step_noise"), self.parts.method.block, len(self.sigmas)
    )
    return np.concatenate([np.zeros_like(table[:, :1])] * first + [table], axis=1)


class Recorded(CompiledPipeline):
  """With the noise of a recording."""

  def __init__(self, engine: Engine, table: np.ndarray):
    super().__init__(engine, engine.method)
    self.table = table

  def noise(self, pipe):
    table = jax.numpy.asarray(self.table)
    return lambda level, n: table[level, n]


@pytest.mark.parametrize(("folder", "file", "layout"), CASES)
def test_a_recording_on_a_layout(folder, file, layout):
  recording = Recording(golden_cases.Case(golden_cases.ROOT / folder), file)
  k, given, levels = recording.parts.method.block, recording.given, len(recording.sigmas) - 1
  first = 0 if given is None else given.shape[1] // k
  video, table = channels_last(recording.z["latents"]), recording.noise_table(first)
  programs = Recorded(quick_engine(recording.parts, TickOptions(layout=layout)), table)
  text = jax.device_put(recording.z["prompt_embeds"], programs.engine.whole)
  pipe = programs.start(
    jax.numpy.stack([text] * max(1, first)), np.zeros(len(text), np.int32), given
  )
  out = []
  for _ in range(table.shape[1] - first + levels - 1):
    pipe, block = programs.tick(pipe, text, False)
    out.append(np.asarray(block))
  assert programs.engine.mesh.size == layout.devices
  assert_close(np.concatenate(out[levels - 1 :], axis=1), video[:, first * k :], "video")
