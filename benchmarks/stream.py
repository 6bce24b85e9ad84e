"""Latency, throughput and stability of streaming: `python -m benchmarks.stream`.

The student of an experiment (by default the shapes world's), with random weights, is streamed on
several layouts of devices, each in a process of its own; on a CPU the devices are virtual and share
its cores, so layouts show their overhead there, not their gain on accelerators. Measured without
decoding (the latents of each block are fetched to the host as they leave the pipeline) and with it
(frames are taken from a Stream, whose own thread decodes). Compilation is in no number but
compile_s. Prints one JSON object:

    compile_s            building the engine's programs, with the first run of each
    first_latents_s      from making a generation (its prompt's text included) to its first block
                         on the host; `ticks_to_first` ticks
    first_frames_s       the same to its first decoded frames
    blocks_per_s         blocks / time of the steady part: after the pipeline is full and 10 % of
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
import gc
import json
import os
import pathlib
import subprocess
import sys
import time

from absl import flags
import jax
import numpy as np

from benchmarks import machine
from hiar_jax.components import patch_pca
from hiar_jax.components.block_decoder import FramewiseDecoder
from hiar_jax.components.patch_pca import PatchPCA, PatchPCAConfig
from hiar_jax.config import command_line as configs
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.errors import UserError
from hiar_jax.models.frames import bind
from hiar_jax.streaming.compiled_tick import Engine, StreamParts, TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.live_video import LiveVideo
from hiar_jax.streaming.producer import Stream
from hiar_jax.training.experiment import Experiment
from hiar_jax.video.frames import to_uint8

SAMPLES = 40  # samples of memory in a run


def parts_of(e: Experiment) -> StreamParts:
  """Returns the student's sizes and method with random weights and texts."""
  text = np.random.default_rng(0).standard_normal((1, e.text.length, e.text.dim), np.float32)
  params = jax.jit(e.student_dit.init)(jax.random.key(0))
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
  """Returns a random codec of the experiment's sizes.

  Raises:
    UserError: another kind of codec than patches.
  """
  if not isinstance(e.codec, PatchPCAConfig):
    raise UserError(
      f"codec.kind = {e.codec.kind!r}: this benchmark decodes with 'patches' alone; give an "
      "experiment that does"
    )
  pixels, channels = e.codec.patch * e.codec.patch * 3, e.codec.channels
  random = np.random.default_rng(1).standard_normal((pixels, channels)).astype(np.float32)
  basis, _ = np.linalg.qr(random)  # orthonormal columns, as principal components
  return PatchPCA(
    np.zeros(pixels, np.float32), basis, np.ones(channels, np.float32), patch=e.codec.patch
  )


# --------------------------------------------------------------------------------------- one layout


def measure(e: Experiment, layout: Layout, blocks: int) -> dict:
  """Streams `blocks` blocks on a layout of devices, without and with decoding."""
  codec, start = codec_of(e), time.perf_counter()
  engine = Engine(parts_of(e), TickOptions(layout=layout))
  # Compiles: a generation up to its first block runs every program once.
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
    "ticks_to_first": engine.method.levels,
    "forwards_per_block": forwards(engine),
  }


def latents_only(engine: Engine, blocks: int) -> dict:
  """Streams blocks of latents to the host, on this thread."""
  times, memory, ticks = [], Memory(blocks), 0
  start = time.perf_counter()
  generation = LiveVideo(engine, "a")
  while len(times) < blocks:
    emitted, ticks = generation.step(), ticks + 1
    if emitted is not None:
      np.asarray(emitted.latents)  # waits for the block
      times.append(time.perf_counter() - start)
      memory.sample(len(times))
  # The ticks that fill the pipeline, before the first block, are not counted.
  ticks_per_block = (ticks - engine.method.levels + 1) / blocks
  return {
    "first_latents_s": round(times[0], 4),
    **steady(times),
    **memory.slopes(),
    "ticks_per_block": ticks_per_block,
  }


def decoded(codec: PatchPCA, engine: Engine, blocks: int) -> dict:
  """Streams decoded frames to a client that takes every chunk at once."""
  decode = jax.jit(patch_pca.decode)
  decoder = FramewiseDecoder(lambda latents: [to_uint8(decode(codec, np.asarray(latents)))])
  block = (1, engine.method.block, *engine.parts.size, engine.parts.config.channels)
  decoder(np.zeros(block, np.float32), None)  # compiles
  times, memory = [], Memory(blocks)
  start = time.perf_counter()
  with Stream(LiveVideo(engine, "a"), decoder, fps=16.0, blocks=blocks) as stream:
    for _ in stream:
      times.append(time.perf_counter() - start)
      memory.sample(len(times))
  return {"first_frames_s": round(times[0], 4), **steady(times), **memory.slopes()}


def steady(times: list[float]) -> dict:
  """Returns throughput, jitter and drift from the arrival times of blocks, seconds."""
  kept = np.asarray(times[len(times) // 10 :])
  intervals = np.diff(kept)
  low, median, high = np.percentile(intervals, (5, 50, 95))
  # Clipped, so that single pauses of the machine do not tilt the line.
  slope = np.polyfit(np.arange(intervals.size), np.clip(intervals, low, high), 1)[0]
  return {
    "blocks": len(times),
    "blocks_per_s": round(intervals.size / (kept[-1] - kept[0]), 3),
    "interval_s": {"median": round(median, 5), "p5": round(low, 5), "p95": round(high, 5)},
    "jitter": round((high - low) / median, 3),
    "drift_per_1000": round(1000 * slope / median, 4),
  }


class Memory:
  """Samples the process's memory about SAMPLES times in a run, and fits a line to the last 90 %."""

  def __init__(self, blocks: int):
    self.every = max(1, blocks // SAMPLES)
    self.first = blocks // 10
    self.samples = []
    gc.collect()
    # Objects that exist by now are excluded from later collections, which would otherwise lengthen
    # the intervals in which a sample is taken.
    gc.freeze()

  def sample(self, block: int) -> None:
    if block % self.every == 0 and block >= self.first:
      gc.collect()  # else garbage that waits for collection counts as growth
      arrays = sum(array.nbytes for array in jax.live_arrays())
      self.samples.append((block, own_pages(), arrays))

  def slopes(self) -> dict:
    """Returns the growth in bytes per block, and the last sample; {} for fewer than 3 samples."""
    if len(self.samples) < 3:
      return {}
    block, pages, arrays = np.asarray(self.samples, np.float64).T
    slope = lambda y: round(float(np.polyfit(block, y, 1)[0]), 1)
    return {
      "memory_per_block": {"process": slope(pages), "arrays": slope(arrays)},
      "memory_bytes": {"process": int(pages[-1]), "arrays": int(arrays[-1])},
    }


def own_pages() -> int:
  """Returns the anonymous bytes of this process (Linux)."""
  text = pathlib.Path("/proc/self/status").read_text()
  return sum(
    int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:")
  )


def forwards(engine: Engine) -> int:
  """Counts the applications of the network per block: calls in one tick, each on every level, for
  the one block that leaves.
  """
  calls = 0  # while the tick is traced, without running it

  class CountedNetwork:
    """The network of the engine, each application counted."""

    def __getattr__(self, name):
      return getattr(engine.parts.config, name)

    def apply(self, *arguments):
      nonlocal calls
      calls += 1
      return engine.parts.config.apply(*arguments)

  class Counted(type(engine.main)):
    def bound(self, params, text):
      return bind(CountedNetwork(), params, text)

  programs = Counted(engine, engine.method)
  text = jax.ShapeDtypeStruct(engine.text("a").shape, np.float32)
  state = programs.abstract(text)
  flag = jax.ShapeDtypeStruct((), bool)
  jax.eval_shape(programs.compiled_tick, engine.params, state, text, flag)
  return calls * engine.method.levels


# -------------------------------------------------------------------------------------- all layouts


def run_layout(layout: str) -> dict:
  """Measures a layout in a process of its own, which fixes the number of virtual devices."""
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
    raise UserError(f"--layouts: {layout!r} is no layout; give level x tensor x sequence, as 4x1x1")
  return tuple(int(size) for size in sizes)


def main() -> None:
  """Measures the layouts and prints the report, or only the layout of --one."""
  f = flags.FLAGS
  if f.one:
    print(json.dumps(measure(build(Experiment, f.config), Layout(*parse(f.one)), f.blocks)))
    return
  for layout in f.layouts:
    parse(layout)  # a typo in the last one fails before the first is measured
  results = []
  for layout in f.layouts:
    print(f"level x tensor x sequence = {layout}", file=sys.stderr)
    results.append(run_layout(layout))
  found = {"benchmark": "stream", "config": to_json(f.config), "layouts": results}
  print(machine.report(found))


if __name__ == "__main__":
  configs.define_config(
    "the experiment whose student is streamed", Experiment, default="experiments/shapes.py"
  )
  flags.DEFINE_integer(
    "blocks", 2_000, "blocks to stream on each layout, without and again with decoding", 20
  )
  flags.DEFINE_list(
    "layouts",
    ["1x1x1", "2x1x1", "4x1x1", "2x2x1", "4x2x1"],
    "layouts of devices to measure, each as level x tensor x sequence",
  )
  flags.DEFINE_string("one", "", "measure one layout in this process (the benchmark calls itself)")
  configs.run_flags(main)
