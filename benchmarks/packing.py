"""Cost of a section with packed history, for histories of any length:

    python -m benchmarks.packing --schedule=f1k1_x_td_f16k4f2k2f1k1_g9

One forward of a small DiT over the packed history and the noisy section behind it, for videos of
--histories frames. Frames that do not exist are zeros, so that all lengths run one program; a
compressed tail (tc) makes two of them, with and without, and an appended one (ta) one for each
length. A schedule that keeps a tail needs --nopublished. Prints one JSON object; for each history:

    tokens          of context and section, as the program has them
    tokens_480p     those of the schedule at 480 x 832; unpacked_480p: with all frames whole
    flops           of the compiled program, by XLA's own count
    pack_s          making the groups from the video (median); a tail that is kept is read whole
    forward_s       one forward: median, 5th and 95th percentile

`programs` counts what was compiled for all of them.
"""

import sys
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from hiar_jax.config import command_line as configs
from hiar_jax.models.dit import DiTConfig
from hiar_jax.packing.orders import plan
from hiar_jax.packing.rows import History, groups_of_row, tables
from hiar_jax.packing.schedule import Schedule, parse

ROWS, COLUMNS = 8, 12  # of patches, here
ROWS_480P, COLUMNS_480P = 30, 52
TEXT = 16  # tokens


def network(schedule: Schedule) -> DiTConfig:
  """Returns a DiT small enough for any machine, with the schedule's kernels."""
  pools = tuple(sorted({group.pool for group in schedule.groups}))
  layers = 4  # unrolled: XLA counts the operations of a loop's body once
  return DiTConfig(
    dim=128,
    ffn_dim=512,
    num_heads=4,
    num_layers=layers,
    text_dim=32,
    packing=pools,
    merge_tokens=True,
    unroll=layers,
  )


def measure(schedule: Schedule, history: int, run, params, repeats: int, published: bool) -> dict:
  """Times the section behind `history` frames."""
  config, draw = network(schedule), np.random.default_rng(history)
  shape = (1, history, 2 * ROWS, 2 * COLUMNS, config.channels)
  video = jnp.asarray(draw.standard_normal(shape, np.float32))
  noise = draw.standard_normal((1, schedule.generate, *video.shape[2:]), np.float32)
  texts = jnp.asarray(draw.standard_normal((1, 1, TEXT, config.text_dim), np.float32))
  (table,) = tables(plan(schedule, [(0,)], given=history, published=published))
  row = jax.tree.map(lambda part: part[0], table)
  pack_times, times = [], []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    groups = groups_of_row(
      schedule, History(), video, row, noise, np.float32(0.5), patch=config.patch
    )
    jax.block_until_ready(groups)
    pack_times.append(time.perf_counter() - start)
    start = time.perf_counter()
    out = jax.block_until_ready(run(params, groups, texts))
    times.append(time.perf_counter() - start)
  low, median, high = np.percentile(times[1:], (5, 50, 95))
  whole = (history + schedule.generate) * ROWS_480P * COLUMNS_480P
  return {
    "tokens": sum(kv.k.shape[2] * kv.k.shape[3] for kv in out.kv),
    "tokens_480p": schedule.tokens(ROWS_480P, COLUMNS_480P),
    "unpacked_480p": whole,
    "flops": run.lower(params, groups, texts).compile().cost_analysis()["flops"],
    "pack_s": round(float(np.median(pack_times[1:])), 5),
    "forward_s": {"median": round(median, 4), "p5": round(low, 4), "p95": round(high, 4)},
  }


def main() -> None:
  """Measures the histories and prints the report."""
  f = flags.FLAGS
  schedule = parse(f.schedule)
  config = network(schedule)
  params, run = config.init(jax.random.key(0)), jax.jit(config.apply)
  histories = {}
  for text in f.histories:
    print(f"{text} frames", file=sys.stderr)
    histories[text] = measure(schedule, int(text), run, params, f.repeats, f.published)
  found = {
    "benchmark": "packing",
    "schedule": schedule.notation,
    "published": f.published,
    "patches": [ROWS, COLUMNS],
    "histories": histories,
    "programs": run._cache_size(),
  }
  print(machine.report(found))


if __name__ == "__main__":
  flags.DEFINE_string("schedule", "f1k1_x_td_f16k4f2k2f1k1_g9", "as in hiar_jax.packing.schedule")
  flags.DEFINE_multi_integer("histories", [10, 100, 1_000, 10_000], "frames before the section", 1)
  flags.DEFINE_integer("repeats", 10, "timed forwards of each history", 1)
  flags.DEFINE_bool("published", True, "the published code's frame indices")
  configs.run_flags(main)
