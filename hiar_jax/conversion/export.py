"""From weights here back to published files: safetensors under Wan2.1's original names or
diffusers', with the configs that others read.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from hiar_jax.checkpoints import weights
from hiar_jax.checkpoints.stored_arrays import Cast, disk_errors
from hiar_jax.checkpoints.training_state import load_params
from hiar_jax.config.building import build
from hiar_jax.config.workdir import read_resolved
from hiar_jax.conversion import catalog, layouts
from hiar_jax.conversion.key_maps import iterate_published
from hiar_jax.errors import UserError
from hiar_jax.files import write_atomic
from hiar_jax.training.experiment import Experiment
from hiar_jax.types import PyTree

LAYOUTS = ("original", "diffusers")
STAGES = ("distill", "causal_init", "teacher")
TOKENIZER = "tokenizer/tokenizer.json"
# File names without their ending, where they differ from PLACES'.
STEMS = {
  ("vae", "diffusers"): "diffusion_pytorch_model",
  ("umt5", "diffusers"): "model",
  ("dit", "diffusers"): "diffusion_pytorch_model",
}


@dataclasses.dataclass(frozen=True)
class Part:
  """One model to be written: its tree of arrays, or of what is read like arrays."""

  kind: str
  config: Any
  tree: PyTree


@dataclasses.dataclass(frozen=True)
class Target:
  """Where a part goes: a folder, and how its files are named."""

  folder: pathlib.Path
  stem: str

  @property
  def taken(self) -> list[pathlib.Path]:
    """Files of these names that are there already."""
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
  """Writes what a weights directory or a training run holds (of one kind, or all); yields a line
  for each thing that was done.

  With a run's model goes what it was trained with: autoencoder, text encoder, tokenizer. Each part
  is complete or not there. Raises UserError where there is nothing to write, a model has parts that
  Wan2.1 lacks, or the folder holds one already.
  """
  directories = _directories(source)
  parts = [part for part in _parts(source, directories, stage) if kind in (None, part.kind)]
  if not parts:
    raise UserError(
      f"--export={source} holds nothing{f' of kind {kind!r}' if kind else ''} to write; check the "
      "path"
    )
  targets = {part.kind: _target(part.kind, layout, out) for part in parts}
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
  """Kind -> the weights directory that holds it: the source, or what a run's config names beside
  the model that it trained.
  """
  stored = read_resolved(source)
  if stored is None:
    named = dict.fromkeys(weights.KINDS, source)
  else:
    experiment = build(Experiment, stored)
    named = {"vae": experiment.codec, "umt5": experiment.text}
    named = {
      kind: pathlib.Path(group.weights)
      for kind, group in named.items()
      if getattr(group, "weights", "")
    }
  return {kind: directory for kind, directory in named.items() if weights.exists(directory, kind)}


def _parts(
  source: pathlib.Path, directories: Mapping[str, pathlib.Path], stage: str
) -> Iterator[Part]:
  stored = read_resolved(source)
  if stored is not None:
    experiment = build(Experiment, stored)
    folder = source / stage
    if not folder.is_dir() and experiment.stages_from and stage != "distill":
      folder = pathlib.Path(experiment.stages_from) / stage
    yield Part("dit", experiment.dit, load_params(folder / "checkpoints"))
  for kind, directory in directories.items():
    yield Part(kind, *weights.open_arrays(directory, kind))


def _target(kind: str, layout: str, out: pathlib.Path) -> Target | None:
  folder, stem = layouts.PLACES[kind]
  if layout == "original":
    return Target(out, stem)
  return Target(out / folder, STEMS[kind, layout]) if folder else None


# ----------------------------------------------------------------------------------------- one part


def _write_part(part: Part, layout: str, target: Target, dtype: str | None, max_shard: int) -> str:
  """Writes into a folder beside the final one, then moves file by file, the config last."""
  rules = layouts.rules_of(part.kind, part.config, layout)
  tree = part.tree if dtype is None else jax.tree.map(lambda leaf: Cast(leaf, dtype), part.tree)
  tensors = iterate_published(tree, rules, f"{part.kind} ({layout} names)")
  staging = target.folder / f".{part.kind}.tmp"
  config = catalog.model_config(part.kind, part.config, layout)
  try:
    with disk_errors(target.folder):
      shutil.rmtree(staging, ignore_errors=True)
      staging.mkdir(parents=True)
      dtypes = {
        tuple(key.key for key in path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      }
      shards = plan_shards(
        {rule.name: np.prod(rule.shape) * dtypes[rule.path].itemsize for rule in rules}, max_shard
      )
      size, count = write_shards(staging, target.stem, tensors, shards)
      for path in target.taken:  # of an earlier export, maybe in more shards
        path.unlink()
      for path in sorted(staging.iterdir()):
        os.replace(path, target.folder / path.name)
      if config is not None:
        write_atomic(target.folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
  finally:
    shutil.rmtree(staging, ignore_errors=True)
  shards = f" in {count} shards" if count > 1 else ""
  return f"{part.kind}: {len(rules)} tensors, {size / 1e9:.3g} GB{shards} -> {target.folder}"


def plan_shards(sizes: Mapping[str, int], max_shard: int) -> list[list[str]]:
  """Names by shard, in order, from their bytes; a tensor larger than a shard has one to itself."""
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
  """Writes tensors, which come in the order of `shards`, as safetensors; -> (bytes, files).

  One shard is in memory at a time.
  """
  total, places = 0, {}
  for number, names in enumerate(shards, 1):
    name = (
      f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
      if len(shards) > 1
      else f"{stem}.safetensors"
    )
    arrays = dict(next(tensors) for _ in names)
    # transformers refuses files that do not say so
    save_file(arrays, folder / name, metadata={"format": "pt"})
    with open(folder / name, "rb") as file:
      os.fsync(file.fileno())
    total += sum(array.nbytes for array in arrays.values())
    places |= dict.fromkeys(arrays, name)
    del arrays
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_atomic(
      folder / f"{stem}.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode()
    )
  return total, len(shards)


# ---------------------------------------------------------------------------- what lies beside them


def _companions(
  tokenizer: pathlib.Path, layout: str, out: pathlib.Path, written: list[str]
) -> Iterator[str]:
  """The tokenizer; and in diffusers' layout, where all is there, what makes a pipeline of the
  parts.
  """
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
