"""Converts published weights to a weights directory, and exports weights to published files.

    python -m hiar_jax.convert --source=Wan2.1-T2V-1.3B --out=weights/wan_1_3b
    python -m hiar_jax.convert --export=weights/hiar --layout=diffusers --out=hiar-diffusers

--source is a folder in Wan2.1's original layout or in diffusers', or one file (.safetensors, .pt,
.pth); its --out is a weights directory (see weights.py). --export is a weights directory or a
training run's directory. Tensors that are missing or left over are errors that list them;
of a whole pipeline (ComfyUI's), parts of no known model are said and left out. Memory: a few
tensors, or one shard that is written. An interrupted run leaves nothing that passes for weights;
models that are there already are kept without --overwrite, where they are those asked for.
"""

from collections.abc import Iterator
import pathlib
import re
import sys

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from hiar_jax.checkpoints import lock, weights
from hiar_jax.checkpoints.on_disk import TOKENIZER
from hiar_jax.checkpoints.stored_arrays import Cast
from hiar_jax.config import command_line as configs
from hiar_jax.conversion import export as exports
from hiar_jax.conversion import layouts
from hiar_jax.conversion.key_maps import view_published
from hiar_jax.conversion.layouts import Model
from hiar_jax.errors import Damaged, UserError
from hiar_jax.files import check_name, write_atomic

DTYPES = ("keep", "bfloat16", "float32")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


# --------------------------------------------------------------------------------- files to weights


def convert(
  source: str,
  out: str,
  *,
  kind: str | None = None,
  entry: str | None = None,
  dtype: str | None = None,
  heads: int | None = None,
  overwrite: bool = False,
) -> Iterator[str]:
  """Converts the models of a source into the weights directory `out`; yields lines of report.

  kind: one model alone; entry: the state dict of a .pt file with several; dtype: a cast (default:
  as published); heads: of the DiT (default: from its config.json or its width). The lock of `out`
  is held from the first step to the last, an error, or close(). Raises UserError if a model is not
  exactly a known one, a file is missing, cut off or damaged, or `out` is written to already.
  """
  with lock.held(out, f"--out={out}"):
    root = pathlib.Path(source)
    found = layouts.find_models(root)
    if kind is not None:
      # Kind None: only the tensors can tell, so open_model checks it against `kind`.
      found = [(kind, path) for found_kind, path in found if found_kind in (None, kind)]
      if not found:
        raise UserError(
          f"--kind={kind}: {source} holds nothing of that kind; leave --kind out to convert what "
          "is there"
        )
    if kind in (None, "dit"):
      layouts.check_experts(root)
    # All are opened before the first is written: what is not supported is said at once.
    models = [layouts.open_model(path, given, entry=entry, heads=heads) for given, path in found]
    said: set[str] = set()  # of a file with several models
    for model in models:
      yield from (note for note in model.tensors.notes if note not in said)
      said.update(model.tensors.notes)
      yield _convert_model(model, out, dtype, overwrite)
    done = [model.kind for model in models]
    if root.is_dir() and kind is None:
      yield from _copy_tokenizer(root, pathlib.Path(out), overwrite)
      lacking = layouts.missing(done)
      if lacking and len(found) > 1:  # a folder of one model is not meant to be complete
        yield f"{source} has no {' and no '.join(lacking)}, which generating a video needs"


def _convert_model(model: Model, out: str, dtype: str | None, overwrite: bool) -> str:
  """Writes one model, if it is not there; returns a line of report."""
  folder = pathlib.Path(out) / model.kind
  source = ", ".join(path.name for path in model.tensors.files)
  rules = layouts.key_map(model.kind, model.config, model.layout)
  # Before the check for existing weights: a source that does not fit is an error in any case.
  tree = view_published(
    model.tensors.named, rules, f"{source}: {model.kind} ({model.layout} names)"
  )
  for leaf in jax.tree.leaves(tree):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise UserError(
        f"{source}: tensors of dtype {leaf.dtype}; expected floating numbers (quantised "
        "weights are not read)"
      )
  if dtype is not None:
    tree = jax.tree.map(lambda leaf: Cast(leaf, dtype), tree)
  if weights.exists(out, model.kind) and not overwrite:
    return _kept(model, out, weights.dtypes_of(tree))
  size = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
  entry = model.tensors.entry
  found = weights.save(
    out, model.kind, model.config, tree, source=source, tensors=len(rules), entry=entry
  )
  return (
    f"{folder}: {found.parameters:,} parameters in {found.tensors} tensors, {found.dtype}, "
    f"{size / 1e9:.3g} GB, from {source} ({model.layout} names)"
  )


def _kept(model: Model, out: str, dtype: str) -> str:
  """Returns the line of report on weights that are there already.

  Raises UserError where they are others: of another config, entry or dtype.
  """
  folder, there = pathlib.Path(out) / model.kind, weights.describe(out, model.kind)
  asked = weights.config_to_json(model.config)
  pairs = {name: (there.config.get(name), value) for name, value in asked.items()}
  pairs["dtype"] = there.dtype, dtype
  if there.entry is not None:
    pairs["entry"] = there.entry or "none", model.tensors.entry or "none"
  differing = [f"{name} {old}, asked for {new}" for name, (old, new) in pairs.items() if old != new]
  if differing:
    raise UserError(
      f"{folder} is there already, other weights (from {there.source}: {'; '.join(differing)}); "
      "give another --out, or --overwrite"
    )
  return (
    f"{folder} is there already ({there.parameters:,} parameters, from {there.source}); kept, "
    "--overwrite replaces it"
  )


def _copy_tokenizer(source: pathlib.Path, out: pathlib.Path, overwrite: bool) -> Iterator[str]:
  """Copies the source's tokenizer, if it has one; yields lines of report."""
  found = next((source / name for name in layouts.TOKENIZERS if (source / name).is_file()), None)
  target = out / TOKENIZER
  if found is None:
    return
  if target.exists() and not overwrite:
    yield f"{target} is there already; kept, --overwrite replaces it"
    return
  content = found.read_bytes()
  # Parsed before it is copied: a damaged file would otherwise fail only when a prompt is encoded.
  try:
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
  except Exception as error:  # the library raises nothing more precise
    raise Damaged(found, error, "download it again") from error
  write_atomic(target, content)
  yield f"{target}: {tokenizer.get_vocab_size():,} tokens, from {found.relative_to(source)}"


# ------------------------------------------------------------------------------------- command line


def parse_bytes(text: str) -> int:
  """Parses '5GB', '500MB' or a plain number of bytes. Raises UserError for anything else."""
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip().upper())
  if not match or not float(match[1]):
    raise UserError(f"--max_shard={text}: expected a size such as 5GB or 500MB")
  return int(float(match[1]) * UNITS[match[2]])


def main() -> None:
  """Runs the direction that the flags choose and prints its lines of report."""
  f = flags.FLAGS
  if (f.source is None) == (f.export is None):
    raise UserError(
      "give either --source=FILES, to convert published weights, or --export=DIRECTORY, to write "
      "them again"
    )
  if not f.out:
    raise UserError(
      "--out is missing; give the directory to write, as "
      f"--out={'weights/wan' if f.source else 'exported'}"
    )
  for name in ("entry", "heads") if f.source is None else ("layout", "max_shard", "stage"):
    if f[name].value is not None:
      direction = "--export" if f.source is not None else "--source"
      raise UserError(f"--{name}={f[name].value} belongs to {direction}; leave it out")
  dtype = None if f.dtype == "keep" else f.dtype
  if f.source is not None:
    check_name(f.out, f"--out={f.out}")
    lines = convert(
      f.source, f.out, kind=f.kind, entry=f.entry, dtype=dtype, heads=f.heads, overwrite=f.overwrite
    )
  else:
    if f.layout is None:
      raise UserError(f"--layout is missing; give one of {', '.join(exports.LAYOUTS)}")
    lines = exports.export(
      pathlib.Path(f.export),
      f.layout,
      pathlib.Path(f.out),
      kind=f.kind,
      dtype=dtype,
      max_shard=parse_bytes(f.max_shard or "5GB"),
      stage=f.stage or exports.STAGES[0],
      overwrite=f.overwrite,
    )
  for line in lines:
    print(line, file=sys.stdout, flush=True)


if __name__ == "__main__":
  configs.define_path(
    "source", None, "published weights: a folder, or a .safetensors, .pt or .pth file"
  )
  configs.define_path("export", None, "weights that this tool made, or a training run's directory")
  configs.define_path("out", None, "the directory to write")
  flags.DEFINE_enum("kind", None, weights.KINDS, "convert or export this part alone")
  flags.DEFINE_string("entry", None, "which weights of a .pt file with several, as generator_ema")
  flags.DEFINE_integer(
    "heads",
    None,
    "attention heads of the DiT; default: what its config.json says, or one per 128 of its width",
    1,
  )
  flags.DEFINE_enum("dtype", "keep", DTYPES, "cast to it, or keep what the source has")
  flags.DEFINE_bool("overwrite", False, "replace what is there")
  flags.DEFINE_enum("layout", None, exports.LAYOUTS, "whose names and folders to write")
  flags.DEFINE_string(
    "max_shard", None, "largest safetensors file to write (default 5GB); one is in memory at a time"
  )
  flags.DEFINE_enum(
    "stage", None, exports.STAGES, f"whose weights of a training run (default {exports.STAGES[0]})"
  )
  configs.run_flags(main)
