"""Streaming: `python -m benchmarks.stream` says how soon the first frames come, how steadily the
others follow, and whether it lasts.

The student of an experiment (by default the shapes world's), with random weights, is streamed on
several layouts of devices, each in a process of its own; on a CPU the devices are virtual and share
its cores, so layouts show what they cost there, not what they gain on accelerators. Once the
latents of each block are fetched to the host as they leave the pipe (no decoding), and once frames
are taken from a Stream, whose own thread decodes. Compiling is reported for itself and is in no
other number. Prints one JSON object:

    compile_s            building the engine's programs, with the first run of each
    first_latents_s      from making a generation (its prompt's text included) to its first block
                         on the host; `ticks_to_first` ticks
    first_frames_s       the same to its first decoded frames
    blocks_per_s         blocks / time of the steady part: after the pipe is full and a tenth of
                         the run is over
    interval_s           between blocks in that part: median, 5th and 95th percentile; jitter:
                         (95th - 5th) / median
    drift_per_1000       change of the interval over 1,000 blocks by a linear fit, as a share of
                         the median
    memory_per_block     bytes: slope of the process's own pages (and of live arrays) over that part
    ticks_per_block, forwards_per_block     counted: a tick is one batched forward of all levels;
                         each level's forward is of two blocks
"""

import dataclasses
import functools
import gc
import json
import os
import pathlib
import subprocess
import sys
import time

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

from benchmarks import machine
from hiar_jax.components import patch_pca
from hiar_jax.components.patch_pca import PatchPCA, PatchPCAConfig
from hiar_jax.config import command_line as configs
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.errors import UserError
from hiar_jax.models import dit
from hiar_jax.streaming.compiled_tick import Engine, StreamParts, TickOptions
from hiar_jax.streaming.decoding import FramewiseDecoder
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.live_video import LiveVideo
from hiar_jax.streaming.producer import Stream
from hiar_jax.training.experiment import Experiment

SAMPLES = 40  # looks at memory


def parts_of(e: Experiment) -> StreamParts:
  """The student's sizes and method, weights and texts at random."""
  text = np.random.default_rng(0).standard_normal((1, e.text.length, e.text.dim), np.float32)
  params = jax.jit(functools.partial(dit.init, e.student_dit))(jax.random.key(0))
  size = e.latent.height, e.latent.width
  return StreamParts(
    e.student_dit,
    e.history,
    tuple(float(sigma) for sigma in e.student.sigmas),
    params,
    jax.random.key(1),
    size,
    lambda prompts: np.repeat(text, len(prompts), axis=0),
    "benchmark",
  )


def codec_of(e: Experiment) -> PatchPCA:
  """Of the experiment's sizes, at random."""
  if not isinstance(e.codec, PatchPCAConfig):
    raise UserError(
      f"codec.kind = {e.codec.kind!r}: this benchmark decodes with 'patches' alone; give an "
      "experiment that does"
    )
  pixels, channels = e.codec.patch * e.codec.patch * 3, e.codec.channels
  basis, _ = np.linalg.qr(
    np.random.default_rng(1).standard_normal((pixels, channels)).astype(np.float32)
  )
  return PatchPCA(
    np.zeros(pixels, np.float32), basis, np.ones(channels, np.float32), patch=e.codec.patch
  )


# --------------------------------------------------------------------------------------- one layout


def measure(e: Experiment, layout: Layout, blocks: int) -> dict:
  codec, start = codec_of(e), time.perf_counter()
  engine = Engine(parts_of(e), TickOptions(layout=layout))
  warm = LiveVideo(engine, "a")
  while warm.step() is None:
    pass
  jax.block_until_ready(warm._pipe)
  del warm
  compiled = time.perf_counter() - start
  return {
    "layout": dataclasses.asdict(layout),
    "devices": layout.devices,
    "compile_s": round(compiled, 2),
    "without_decoding": latents_only(engine, blocks),
    "with_decoding": decoded(codec, engine, blocks),
    "ticks_to_first": engine.plan.levels,
    "forwards_per_block": forwards(engine),
  }


def latents_only(engine: Engine, blocks: int) -> dict:
  times, memory, ticks = [], Memory(blocks), 0
  start = time.perf_counter()
  generation = LiveVideo(engine, "a")
  while len(times) < blocks:
    emitted, ticks = generation.step(), ticks + 1
    if emitted is not None:
      np.asarray(emitted.latents)
      times.append(time.perf_counter() - start)
      memory.look(len(times))
  ticks_per_block = (ticks - engine.plan.levels + 1) / blocks
  return {
    "first_latents_s": round(times[0], 4),
    **steady(times),
    **memory.slopes(),
    "ticks_per_block": ticks_per_block,
  }


def decoded(codec: PatchPCA, engine: Engine, blocks: int) -> dict:
  """As a viewer has it who takes every chunk at once."""
  decode = jax.jit(patch_pca.decode)
  decoder = FramewiseDecoder(
    lambda latents: [patch_pca.to_uint8(decode(codec, np.asarray(latents)))]
  )
  # compiles
  decoder(
    np.zeros(
      (1, engine.plan.method.block, *engine.parts.size, engine.parts.config.channels), np.float32
    ),
    None,
  )
  times, memory = [], Memory(blocks)
  start = time.perf_counter()
  with Stream(LiveVideo(engine, "a"), decoder, fps=16.0, blocks=blocks) as stream:
    for _ in stream:
      times.append(time.perf_counter() - start)
      memory.look(len(times))
  return {"first_frames_s": round(times[0], 4), **steady(times), **memory.slopes()}


def steady(times: list[float]) -> dict:
  """Of the seconds at which blocks were there."""
  kept = np.asarray(times[len(times) // 10 :])
  intervals = np.diff(kept)
  low, median, high = np.percentile(intervals, (5, 50, 95))
  slope = np.polyfit(np.arange(intervals.size), np.clip(intervals, low, high), 1)[0]
  return {
    "blocks": len(times),
    "blocks_per_s": round(intervals.size / (kept[-1] - kept[0]), 3),
    "interval_s": {"median": round(median, 5), "p5": round(low, 5), "p95": round(high, 5)},
    "jitter": round((high - low) / median, 3),
    "drift_per_1000": round(1000 * slope / median, 4),
  }


class Memory:
  """Looks at the process's memory some forty times in a run, and fits a line to the last nine
  tenths.
  """

  def __init__(self, blocks: int):
    self.every, self.first, self.seen = max(1, blocks // SAMPLES), blocks // 10, []
    gc.collect()
    # what is there by now is not looked through again: a look would stand out among the intervals
    gc.freeze()

  def look(self, block: int) -> None:
    if block % self.every == 0 and block >= self.first:
      gc.collect()
      arrays = sum(array.nbytes for array in jax.live_arrays())
      self.seen.append((block, own_pages(), arrays))

  def slopes(self) -> dict:
    if len(self.seen) < 3:
      return {}
    block, pages, arrays = np.asarray(self.seen, np.float64).T
    slope = lambda y: round(float(np.polyfit(block, y, 1)[0]), 1)
    per_block, now = (
      {"process": slope(pages), "arrays": slope(arrays)},
      {"process": int(pages[-1]), "arrays": int(arrays[-1])},
    )
    return {"memory_per_block": per_block, "memory_bytes": now}


def own_pages() -> int:
  """Anonymous bytes of this process (Linux)."""
  text = pathlib.Path("/proc/self/status").read_text()
  return sum(
    int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:")
  )


def forwards(engine: Engine) -> int:
  """How often the network is applied for a block: calls in one tick, each on every level, for the
  one block that leaves.
  """
  calls = 0

  class Counted(type(engine.main)):
    def network(self, params):
      def bind(text):
        nonlocal calls
        calls += 1
        return dit.bind(engine.parts.config, params, text)

      return bind

  programs = Counted(engine, engine.plan)
  text = jax.ShapeDtypeStruct(engine.text("a").shape, np.float32)
  jax.eval_shape(
    programs.compiled_tick,
    engine.params,
    programs.abstract(text),
    text,
    jax.ShapeDtypeStruct((), bool),
  )
  return calls * engine.plan.levels


# -------------------------------------------------------------------------------------- all of them


def run_layout(layout: str) -> dict:
  """In a process of its own, with as many devices as it takes."""
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(np.prod(parse(layout)))}
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.stream", *sys.argv[1:], f"--one={layout}"],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    raise UserError(f"layout {layout} ended with status {done.returncode}")
  return json.loads(done.stdout)


def parse(layout: str) -> tuple[int, int, int]:
  """'2x2x1' -> (2, 2, 1)."""
  sizes = layout.split("x")
  if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
    raise UserError(f"--layouts: {layout!r} is none; give stage x tensor x sequence, as 4x1x1")
  return tuple(int(size) for size in sizes)


def main() -> None:
  f = flags.FLAGS
  if f.one:
    print(json.dumps(measure(build(Experiment, f.config), Layout(*parse(f.one)), f.blocks)))
    return
  for layout in f.layouts:
    parse(layout)
  found = []
  for layout in f.layouts:
    print(f"stage x tensor x sequence = {layout}", file=sys.stderr)
    found.append(run_layout(layout))
  told = {"benchmark": "stream", "config": to_json(f.config), "layouts": found}
  print(
    json.dumps({**told, "hardware": machine.hardware(), "versions": machine.versions()}, indent=2)
  )


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", "experiments/shapes.py", "the experiment whose student is streamed", lock_config=True
  )
  flags.DEFINE_integer(
    "blocks", 2_000, "to stream on each layout, once without and once with decoding", 20
  )
  flags.DEFINE_list(
    "layouts", ["1x1x1", "2x1x1", "4x1x1", "2x2x1", "4x2x1"], "stage x tensor x sequence"
  )
  flags.DEFINE_string("one", "", "a single layout in this process (the benchmark calls itself)")
  configs.run_flags(main)
