"""Time and memory of the conversion at real size: `python -m benchmarks.convert`.

Random bfloat16 weights of Wan2.1's DiT (by default of the 1.3B's sizes) are written in the
published layout, converted by `python -m hiar_jax.convert`, and loaded for the forward of one block
of 3 frames against an empty cache. Each part runs in a process of its own and is sampled from
outside; memory is what it allocates itself (anonymous pages), without pages of files, which the
system reclaims when it needs them. Prints one JSON object, with the hardware and the versions.
"""

from collections.abc import Iterator
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from hiar_jax.checkpoints import weights
from hiar_jax.config import command_line as configs
from hiar_jax.conversion import catalog, export, layouts
from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.errors import UserError
from hiar_jax.method import Method
from hiar_jax.models import dit
from hiar_jax.models.frames import Frames, bind
from hiar_jax.rollout.blocks import denoise
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.rollout.past.visibility import block_positions
from hiar_jax.types import LatentShape

HISTORY = Method()  # HiAR's
TEXT_TOKENS = 512  # Wan2.1's prompts are padded to it
FACTOR = 8  # pixels per latent pixel, of Wan2.1's VAE
INTERVAL = 0.02  # seconds between two samples of a process's memory


# ---------------------------------------------------------------------------------------- the parts


def write_published(config: dit.DiTConfig, folder: pathlib.Path, max_shard: int) -> list[int]:
  """Writes random weights in the original layout; returns the bytes of each shard."""
  folder.mkdir()
  rules = dit_key_map(config)
  sizes = {rule.name: 2 * int(np.prod(rule.shape)) for rule in rules}  # bytes in bfloat16
  shards = export.plan_shards(sizes, max_shard)

  def random_tensors() -> Iterator[tuple[str, np.ndarray]]:
    # Made as they are written, so that no more than one shard is in memory.
    rng = np.random.default_rng(0)
    for rule in rules:
      yield rule.name, (0.02 * rng.standard_normal(rule.shape, np.float32)).astype(jnp.bfloat16)

  export.write_shards(folder, layouts.FOLDERS_AND_STEMS["dit"][1], random_tensors(), shards)
  (folder / "config.json").write_text(json.dumps(catalog.model_config("dit", config, "original")))
  return [path.stat().st_size for path in folder.glob("*.safetensors")]


def forward_once(directory: str, height: int, width: int) -> dict:
  """Returns the seconds of loading, and of two calls of one block's forward; sides in pixels."""
  start = time.perf_counter()
  config, params = weights.load(directory, "dit")
  jax.block_until_ready(params)
  config = dataclasses.replace(config, dtype="bfloat16")
  loaded = time.perf_counter()
  h, w = height // FACTOR, width // FACTOR
  key_x, key_text = jax.random.split(jax.random.key(0))
  x = jax.random.normal(key_x, (1, HISTORY.block, h, w, config.channels))
  text = jax.random.normal(key_text, (1, TEXT_TOKENS, config.text_dim))
  shape = LatentShape(2 * HISTORY.block, h, w, config.channels)
  past = Ring.empty(config, HISTORY, shape, batch=1)

  @jax.jit
  def call(params, x, text, past):
    return denoise(bind(config, params, text), past, Frames(x, 1.0, block_positions(0, HISTORY)))

  times = [time.perf_counter()]
  for _ in range(2):  # the first call compiles
    velocity, _ = jax.block_until_ready(call(params, x, text, past))
    times.append(time.perf_counter())
  assert bool(jnp.isfinite(velocity).all())
  return {
    "load_s": loaded - start,
    "first_call_s": times[1] - times[0],
    "forward_s": times[2] - times[1],
    "tokens": HISTORY.block * config.tokens(h, w),
    "latents": list(x.shape),
  }


# -------------------------------------------------------------------------------------- measurement


def watch(module: str, *arguments: str) -> tuple[str, float, int]:
  """Runs `python -m module arguments` -> (its stdout, seconds, peak of anonymous bytes)."""
  start, peak = time.perf_counter(), 0
  with (
    # A file, not a pipe: nobody reads while the process runs, and a full pipe would block it.
    tempfile.TemporaryFile("w+") as out,
    subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=out) as process,
  ):
    while process.poll() is None:
      peak = max(peak, anonymous_bytes(process.pid))
      time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    out.seek(0)
    if process.returncode:
      raise UserError(
        f"python -m {module} {' '.join(arguments)} ended with status {process.returncode}"
      )
    return out.read(), seconds, peak


def anonymous_bytes(pid: int) -> int:
  """Returns the bytes that a process holds now in anonymous pages, 0 once it has ended (Linux)."""
  try:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
  except (FileNotFoundError, ProcessLookupError):
    return 0
  return sum(
    int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:")
  )


def measure(
  config: dit.DiTConfig, folder: pathlib.Path, max_shard: int, height: int, width: int
) -> dict:
  """Writes, converts and loads weights below `folder`; returns the figures of the report."""
  source, out = folder / "published", folder / "weights"
  shards = write_published(config, source, max_shard)
  # Baseline: an interpreter with the same imports that does nothing.
  _, idle_s, idle = watch("benchmarks.convert", "--idle")
  output, convert_s, peak = watch("hiar_jax.convert", f"--source={source}", f"--out={out}")
  print(output, file=sys.stderr)
  shutil.rmtree(source)
  forward, _, forward_peak = watch(
    "benchmarks.convert", f"--forward={out}", f"--height={height}", f"--width={width}"
  )
  found = weights.describe(out, "dit")
  return {
    "parameters": found.parameters,
    "tensors": found.tensors,
    "dtype": found.dtype,
    "shards": len(shards),
    "bytes": sum(shards),
    "largest_shard_bytes": max(shards),
    "convert_s": round(convert_s, 2),
    "convert_gb_per_s": round(sum(shards) / 1e9 / convert_s, 3),
    "convert_peak_anonymous_bytes": peak,
    "imports_peak_anonymous_bytes": idle,
    "imports_s": round(idle_s, 2),
    "peak_to_largest_shard": round(peak / max(shards), 3),
    "forward": {
      **json.loads(forward),
      "pixels": [height, width],
      "peak_anonymous_bytes": forward_peak,
    },
  }


def main() -> None:
  """Runs the benchmark, or the part of it that --idle or --forward selects."""
  f = flags.FLAGS
  if f.idle:
    return
  if f.height % (2 * FACTOR) or f.width % (2 * FACTOR):
    raise UserError(f"--height={f.height} --width={f.width}: expected multiples of {2 * FACTOR}")
  if f.forward:
    print(json.dumps(forward_once(f.forward, f.height, f.width)))
    return
  config = dit.DiTConfig(dim=f.dim, ffn_dim=f.ffn_dim, num_heads=f.num_heads, num_layers=f.layers)
  with tempfile.TemporaryDirectory(dir=f.directory) as folder:
    result = measure(config, pathlib.Path(folder), f.max_shard_mb * 10**6, f.height, f.width)
  sizes = {"dim": f.dim, "ffn_dim": f.ffn_dim, "num_heads": f.num_heads, "layers": f.layers}
  found = {"benchmark": "convert", "sizes": sizes, **result}
  print(machine.report(found))


if __name__ == "__main__":
  default = dit.DiTConfig()
  flags.DEFINE_integer("layers", default.num_layers, "layers of the DiT", 1)
  flags.DEFINE_integer("dim", default.dim, "width of the DiT", 1)
  flags.DEFINE_integer("ffn_dim", default.ffn_dim, "width of the DiT's MLPs", 1)
  flags.DEFINE_integer("num_heads", default.num_heads, "attention heads of the DiT", 1)
  flags.DEFINE_integer(
    "max_shard_mb", 10_000, "largest file of the published layout; the 1.3B is published in one", 1
  )
  flags.DEFINE_integer("height", 128, "pixel height of the block that is denoised", 16)
  flags.DEFINE_integer("width", 224, "pixel width of the block that is denoised", 16)
  flags.DEFINE_string(
    "directory",
    None,
    "folder for temporary files, of twice the size of the weights; default: the system's",
  )
  flags.DEFINE_string(
    "forward", None, "run the forward alone, with these weights (the benchmark calls itself)"
  )
  flags.DEFINE_bool("idle", False, "run the imports alone (the benchmark calls itself)")
  configs.run_flags(main)
