"""Published weights of a small model, and how they break: one file, shards with an index, files of
torch.save.
"""

import json
import pathlib
import pickle
import shutil
import zipfile

import numpy as np
from safetensors.numpy import save_file

from benchmarks.fuzz import mutations
from benchmarks.fuzz.mutations import Dice
from hiar_jax import convert
from hiar_jax.checkpoints import weights
from hiar_jax.conversion.taehv_keys import tiny_vae_key_map
from hiar_jax.errors import UserError
from hiar_jax.models.taehv import TinyVAEConfig

SMALL = TinyVAEConfig(
  z_dim=16,
  encoder_width=4,
  decoder_widths=(8, 4),
  blocks=1,
  temporal_downsample=(True,),
  temporal_upsample=(True,),
)
STEM = "taew2_1"


def published() -> dict[str, np.ndarray]:
  dice = np.random.default_rng(0)
  return {
    rule.name: dice.normal(size=rule.shape).astype(np.float32) for rule in tiny_vae_key_map(SMALL)
  }


def read(path: pathlib.Path) -> None:
  """As convert does; a file that is refused leaves nothing."""
  out = path.parent / "out"
  try:
    list(convert.convert(str(path), str(out)))
    weights.load(out, "tiny_vae")
  except UserError:
    if out.exists():
      raise AssertionError(f"half written: {list(out.rglob('*'))}") from None
    raise


def make(folder: pathlib.Path) -> None:
  save_file(published(), folder / f"{STEM}.safetensors")


# ------------------------------------------------------------------------------------------- shards


def make_shards(folder: pathlib.Path) -> None:
  named = published()
  places = {
    name: f"{STEM}-{1 + i * 3 // len(named):05d}-of-00003.safetensors"
    for i, name in enumerate(named)
  }
  for file in set(places.values()):
    save_file({name: x for name, x in named.items() if places[name] == file}, folder / file)
  size = sum(x.nbytes for x in named.values())
  index = {"metadata": {"total_size": size}, "weight_map": places}
  (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def broken_shards(right: pathlib.Path, place: pathlib.Path, dice: Dice) -> pathlib.Path:
  """A folder, of which one or two files or the entries of its index are broken."""
  source = pathlib.Path(shutil.copytree(right, place / "source"))
  for _ in range(int(dice.integers(1, 3))):
    files = sorted(source.iterdir())
    path, other = (files[i] for i in dice.integers(len(files), size=2))
    change = int(dice.integers(6))
    if change == 0 and len(files) > 1:
      path.unlink()
    elif change == 1:
      path.write_bytes(other.read_bytes())
    elif change == 2:
      path.rename(source / f"{dice.integers(9)}{path.name}")
    elif change < 5 and path.suffix == ".json":
      path.write_bytes(broken_index(path.read_text(errors="replace"), dice))
    else:
      path.write_bytes(mutations.mutated(path.read_bytes(), dice))
  return source


def broken_index(text: str, dice: Dice) -> bytes:
  try:
    index = json.loads(text)
    entries = index if dice.random() < 0.3 else index["weight_map"]
    keys = sorted(entries)
    for _ in range(int(dice.integers(1, 4))):
      key, other = (keys[i] for i in dice.integers(len(keys), size=2))
      entries[key] = entries[other] if dice.random() < 0.3 else mutations.value(dice)
    return json.dumps(index).encode()
  except (ValueError, LookupError, TypeError):  # it is broken already
    return mutations.rewritten(text, dice)


# --------------------------------------------------------------------------------------- torch.save

# What pickles may hold that those of weights do not, in the text form of their opcodes.
OPCODES = (
  *(
    "cos\nsystem\n(Vtrue\ntR",
    "cbuiltins\neval\n(V1\ntR",
    "ctorch\nSize\n((I1\nI-1\nttR",
    "N",
    "0",
  ),
  *("I9999999999999999999\n", "I-1\n", "Ix\n", "F1e999\n", "Fnan\n", "L5L\n", "Vx\n", "S'x'\n"),
  *("(", "t", "l", "d", "2", "]", "}", ")", "R", "b", "Q", "u", "s", "a", "e", ".", "p999999999\n"),
  *("g0\n", "p0\n", "ctorch\nHalfStorage\n", "ctorch\nBoolStorage\n", "cbuiltins\nset\n(]tR"),
  "ccollections\nOrderedDict\n)R",
  "ctorch._utils\n_rebuild_parameter\n(I1\ntR",
)


def program(named: dict[str, np.ndarray], entry: str = "") -> str:
  """The pickle of torch.save, in the protocol whose opcodes are text. Storages are numbered."""
  numbers = lambda values: "".join(f"I{value}\n" for value in values)
  tensors = []
  for i, (name, x) in enumerate(named.items()):
    steps = [step // x.itemsize for step in x.strides]
    storage = f"(Vstorage\nctorch\nFloatStorage\nV{i}\nVcpu\nI{x.size}\ntQ"
    rest = f"I0\n({numbers(x.shape)}t({numbers(steps)}tI00\nccollections\nOrderedDict\n)R"
    tensors.append(f"V{name}\nctorch._utils\n_rebuild_tensor_v2\n({storage}{rest}tR")
  state = f"({''.join(tensors)}d"
  return f"(V{entry}\n{state}Vstep\nI7\nd." if entry else f"{state}."


def members(named: dict[str, np.ndarray], entry: str = "") -> dict[str, bytes]:
  storages = {f"a/data/{i}": x.tobytes() for i, x in enumerate(named.values())}
  made = {"a/data.pkl": program(named, entry).encode(), "a/byteorder": b"little"}
  return {**made, **storages, "a/version": b"3\n"}


def archive(path: pathlib.Path, content: dict[str, bytes], compression=zipfile.ZIP_STORED) -> None:
  with zipfile.ZipFile(path, "w", compression) as file:
    for name, data in content.items():
      file.writestr(name, data)


def make_torch(folder: pathlib.Path) -> None:
  named = published()
  archive(folder / f"{STEM}.pth", members(named))
  archive(folder / "generator.pt", members(named, "generator_ema"))
  # of PyTorch before 1.6: pickles one behind another, then the storages
  parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"x": [1.0]}, ["0"])
  legacy = b"".join(pickle.dumps(part, 2) for part in parts)
  (folder / "legacy.pt").write_bytes(legacy + bytes(64))


def broken_torch(right: pathlib.Path, place: pathlib.Path, dice: Dice) -> pathlib.Path:
  """A file of which bytes are changed, or one whose pickle or storages are, rightly archived."""
  files = sorted(right.iterdir())
  path, other = (files[i] for i in dice.integers(len(files), size=2))
  target, data = place / path.name, path.read_bytes()
  if path.name == "legacy.pt" or dice.random() < 0.3:
    spliced = mutations.spliced(data, other.read_bytes(), dice)
    target.write_bytes(spliced if dice.random() < 0.2 else mutations.mutated(data, dice))
    return target
  with zipfile.ZipFile(path) as file:
    content = {name: file.read(name) for name in file.namelist()}
  if dice.random() < 0.8:
    content["a/data.pkl"] = broken_program(content["a/data.pkl"].decode(), dice)
  else:
    names = sorted(content)
    name, instead = (names[i] for i in dice.integers(len(names), size=2))
    taken = content.pop(name)
    content[instead if dice.random() < 0.5 else f"{name}x"] = mutations.mutated(taken, dice)
  compressed = dice.random() < 0.05
  archive(target, content, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
  return target


def broken_program(text: str, dice: Dice) -> bytes:
  """A pickle with lines left out, doubled, exchanged, or with opcodes that it should not have."""
  lines = text.split("\n")
  for _ in range(int(dice.integers(1, 4))):
    i, j = (int(k) for k in dice.integers(len(lines), size=2))
    change = int(dice.integers(5))
    if change == 0:
      lines[i] = ""
    elif change == 1:
      lines[i], lines[j] = lines[j], lines[i]
    elif change == 2:
      at = int(dice.integers(len(lines[i]) + 1))
      lines[i] = lines[i][:at] + OPCODES[dice.integers(len(OPCODES))] + lines[i][at:]
    elif change == 3:
      lines[i] = lines[i][:1] + str(mutations.SIZES[dice.integers(len(mutations.SIZES))])
    else:
      lines[i:j] = lines[i:j] * 2
  data = "\n".join(lines).encode()
  return mutations.mutated(data, dice) if dice.random() < 0.1 else data
