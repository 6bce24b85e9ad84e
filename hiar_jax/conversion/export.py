"""Export of weights to published files: safetensors under Wan2.1's original names or diffusers',
with the config files that other tools read.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from hiar_jax.checkpoints import lock, weights
from hiar_jax.checkpoints.on_disk import CHECKPOINTS, TOKENIZER
from hiar_jax.checkpoints.stored_arrays import Cast
from hiar_jax.checkpoints.training_state import load_params, steps_in
from hiar_jax.config.building import build
from hiar_jax.config.workdir import read_resolved
from hiar_jax.conversion import catalog, layouts
from hiar_jax.conversion.key_maps import iterate_published
from hiar_jax.errors import UserError
from hiar_jax.files import check_space, write_atomic, writing
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.lineage import borrowed, place_of
from hiar_jax.training.places import located
from hiar_jax.types import PyTree

LAYOUTS = ("original", "diffusers")
STAGES = ("distill", "causal_init", "teacher")
# File names without their ending, where they differ from those in layouts.FOLDERS_AND_STEMS.
STEMS = {
  ("vae", "diffusers"): "diffusion_pytorch_model",
  ("umt5", "diffusers"): "model",
  ("dit", "diffusers"): "diffusion_pytorch_model",
}


@dataclasses.dataclass(frozen=True)
class Part:
  """One model to be written; leaves of `tree` are arrays or lazy ones (weights.open_arrays)."""

  kind: str
  config: Any
  tree: PyTree


@dataclasses.dataclass(frozen=True)
class Target:
  """Folder of an exported part, and the start of its file names."""

  folder: pathlib.Path
  stem: str

  @property
  def taken(self) -> list[pathlib.Path]:
    """Existing files of these names."""
    return sorted(self.folder.glob(f"{self.stem}*.safetensors*"))


def export(
  source: pathlib.Path,
  layout: str,
  out: pathlib.Path,
  *,
  kind: str | None = None,
  dtype: str | None = None,
  max_shard: int = 5 * 10**9,
  stage: str = "distill",
  overwrite: bool = False,
) -> Iterator[str]:
  """Writes the models of a weights directory or a training run; yields a line of report for each.

  kind: one model alone; max_shard: bytes of the largest file. A run's model is written together
  with the autoencoder, text encoder and tokenizer that it was trained with. Each part is complete
  or absent. The lock of `out` is held from the first step to the last, an error, or close(). Raises
  UserError if there is nothing to write, a model has parts that Wan2.1 lacks, the files exist
  already, or `out` is written to already.
  """
  with lock.held(out, f"--out={out}"):
    directories = _directories(source)
    parts = [part for part in _parts(source, directories, stage) if kind in (None, part.kind)]
    if not parts:
      raise UserError(
        f"--export={source} holds nothing{f' of kind {kind!r}' if kind else ''} to write; check "
        "the path"
      )
    targets = {part.kind: _target(part.kind, layout, out) for part in parts}
    # All targets are checked before the first is written.
    for part in parts:
      target = targets[part.kind]
      if target is None:
        yield f"{part.kind}: {layout} has no place for it; left out"
        continue
      if target.taken and not overwrite:
        raise UserError(f"{target.taken[0]} is there already; give another --out, or --overwrite")
    written = []
    for part in parts:
      if targets[part.kind] is not None:
        yield _write_part(part, layout, targets[part.kind], dtype, max_shard)
        written.append(part.kind)
    if kind is None:
      yield from _companions(directories.get("umt5", source) / TOKENIZER, layout, out, written)


def _directories(source: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns {kind: weights directory with it}: the source, or those that a run's config names."""
  stored = read_resolved(source)
  if stored is None:
    named = dict.fromkeys(weights.KINDS, source)
  else:
    experiment = build(Experiment, located(stored, source, typed=False))
    # Some components have no field `weights`; an empty one names no directory.
    groups = {"vae": experiment.codec, "umt5": experiment.text}
    named = {
      kind: pathlib.Path(group.weights)
      for kind, group in groups.items()
      if getattr(group, "weights", "")
    }
  return {kind: directory for kind, directory in named.items() if weights.exists(directory, kind)}


def _parts(
  source: pathlib.Path, directories: Mapping[str, pathlib.Path], stage: str
) -> Iterator[Part]:
  stored = read_resolved(source)
  if stored is not None:
    experiment = build(Experiment, located(stored, source, typed=False))
    folder = source / stage
    # A run may borrow its earlier stages from another run.
    if not folder.is_dir() and stage != "distill":
      folder = place_of(experiment, source, borrowed(experiment, source), stage)
    there, last = steps_in(folder / CHECKPOINTS), getattr(experiment, stage).steps
    if there and last not in there:
      print(f"{stage} is not finished: weights of step {there[-1]} of {last}", file=sys.stderr)
    step = last if last in there else None  # of an unfinished one the newest that can be read
    params = load_params(folder / CHECKPOINTS, step=step)
    yield Part("dit", experiment.network_of(stage), params)
  for kind, directory in directories.items():
    yield Part(kind, *weights.open_arrays(directory, kind))


def _target(kind: str, layout: str, out: pathlib.Path) -> Target | None:
  folder, stem = layouts.FOLDERS_AND_STEMS[kind]
  if layout == "original":
    return Target(out, stem)
  return Target(out / folder, STEMS[kind, layout]) if folder else None


# ----------------------------------------------------------------------------------------- one part


def _write_part(part: Part, layout: str, target: Target, dtype: str | None, max_shard: int) -> str:
  """Writes one part; returns a line of report.

  All files are written in a folder inside the target before an older export is touched. Raises
  DiskFull if they do not fit on the disk beside it.
  """
  rules = layouts.key_map(part.kind, part.config, layout)
  tree = part.tree if dtype is None else jax.tree.map(lambda leaf: Cast(leaf, dtype), part.tree)
  tensors = iterate_published(tree, rules, f"{part.kind} ({layout} names)")
  staging = target.folder / f".{part.kind}.tmp"
  config = catalog.model_config(part.kind, part.config, layout)
  # Tensors are produced one at a time, so the split must follow from shapes and dtypes alone.
  dtypes = {
    tuple(key.key for key in path): leaf.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  sizes = {rule.name: math.prod(rule.shape) * dtypes[rule.path].itemsize for rule in rules}
  needed = sum(sizes.values())
  shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
  check_space(target.folder, needed)
  try:
    with writing(target.folder, needed):
      staging.mkdir(parents=True)
    with writing(target.folder, needed, full_disk_alone=True):
      size, count = write_shards(staging, target.stem, tensors, plan_shards(sizes, max_shard))
      if config is not None:
        _write_json(staging / "config.json", config)
      _swap(staging, target, target.folder / f".{part.kind}.old")
  finally:
    shutil.rmtree(staging, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not empty
      target.folder.rmdir()
  shards = f" in {count} shards" if count > 1 else ""
  return f"{part.kind}: {len(rules)} tensors, {size / 1e9:.3g} GB{shards} -> {target.folder}"


def _swap(staging: pathlib.Path, target: Target, aside: pathlib.Path) -> None:
  """Moves the files of `staging` into the target's folder in place of those of an older export.

  Old and new shards never lie side by side: the old files go into the folder `aside` first, and are
  deleted when all new ones are in place. If that fails they are put back; if the process dies, they
  are in `aside`, complete, until the next export replaces them.
  """
  # An index or config comes last: without it the files before it pass for no model.
  new = sorted(staging.iterdir(), key=lambda path: (path.suffix == ".json", path.name))
  places = [target.folder / path.name for path in new]
  moved: list[pathlib.Path] = []
  try:
    for path in {*target.taken, *(path for path in places if path.exists())}:
      aside.mkdir(exist_ok=True)
      if (aside / path.name).exists():  # the old one; this is of an export that died here
        path.unlink()
      else:
        os.replace(path, aside / path.name)
    for path, place in zip(new, places, strict=True):
      os.replace(path, place)
      moved.append(place)
  except BaseException:
    for place in moved:
      place.unlink()
    for path in aside.glob("*"):
      os.replace(path, target.folder / path.name)
    shutil.rmtree(aside, ignore_errors=True)  # it is empty
    raise
  shutil.rmtree(aside, ignore_errors=True)


def plan_shards(sizes: Mapping[str, int], max_shard: int) -> list[list[str]]:
  """Splits names, in order, into shards of at most `max_shard` bytes.

  sizes: bytes by name. A tensor above the limit gets a shard of its own.
  """
  shards: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if shards[-1] and filled + size > max_shard:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  return shards


def write_shards(
  folder: pathlib.Path,
  stem: str,
  tensors: Iterator[tuple[str, np.ndarray]],
  shards: list[list[str]],
) -> tuple[int, int]:
  """Writes tensors, given in the order of `shards`, as safetensors; returns (bytes, files).

  Holds one shard in memory at a time.
  """
  total = 0
  file_of: dict[str, str] = {}
  for number, names in enumerate(shards, 1):
    name = (
      f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
      if len(shards) > 1
      else f"{stem}.safetensors"
    )
    arrays = dict(next(tensors) for _ in names)
    # transformers refuses files without this entry.
    save_file(arrays, folder / name, metadata={"format": "pt"})
    with open(folder / name, "rb") as file:
      os.fsync(file.fileno())
    total += sum(array.nbytes for array in arrays.values())
    file_of |= dict.fromkeys(arrays, name)
    del arrays  # before the next shard is read
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    _write_json(folder / f"{stem}.safetensors.index.json", index)
  return total, len(shards)


# ------------------------------------------------------------------------ tokenizer, pipeline files


def _companions(
  tokenizer: pathlib.Path, layout: str, out: pathlib.Path, written: list[str]
) -> Iterator[str]:
  """Writes the tokenizer and, in diffusers' layout, the pipeline's files if no part is lacking."""
  if tokenizer.is_file():
    content = tokenizer.read_bytes()
    target = out / ("google/umt5-xxl" if layout == "original" else "tokenizer")
    write_atomic(target / "tokenizer.json", content)
    _write_json(target / "tokenizer_config.json", catalog.TOKENIZER)
    yield f"tokenizer -> {target}"
  if layout != "diffusers":
    return
  lacking = [*layouts.missing(written), *([] if tokenizer.is_file() else ["tokenizer"])]
  if lacking:
    yield f"no model_index.json, since there is no {', '.join(lacking)}: load the parts one by one"
    return
  _write_json(out / "scheduler" / "scheduler_config.json", catalog.SCHEDULER)
  _write_json(out / "model_index.json", catalog.PIPELINE)
  yield f"model_index.json -> {out}"


def _write_json(path: pathlib.Path, content: Mapping) -> None:
  write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
