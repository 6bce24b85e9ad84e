"""Published files to weights: every layout, what training code leaves, and what is not right."""

import dataclasses
import json
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hiar_jax.checkpoints import stored_arrays, weights
from hiar_jax.convert import convert
from hiar_jax.errors import UserError
from hiar_jax.models import dit, umt5, vae
from tests.helpers import published_files, tiny_run
from tests.helpers.published_files import (
  CONFIGS,
  diffusers_folder,
  original_folder,
  params,
  tensors,
)
from tests.helpers.torch_archive import save

PARTS = ("dit", "vae", "umt5")


def run(*args, **kwargs) -> list[str]:
  return list(convert(*map(str, args), **kwargs))


def assert_holds(directory, kind, expected=None, config=None):
  found_config, found = weights.load(directory, kind)
  assert found_config == (config or CONFIGS[kind])
  expected = (
    params(kind, "bfloat16" if kind == "umt5" else np.float32) if expected is None else expected
  )
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == b.tobytes()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", [original_folder, diffusers_folder])
def test_whole_folders(tmp_path, layout, shards):
  source = layout(tmp_path / "source", shards)
  lines = run(source, tmp_path / "out")
  for kind in PARTS:
    assert_holds(tmp_path / "out", kind)
  assert (tmp_path / "out/tokenizer/tokenizer.json").read_bytes() == next(
    source.rglob("tokenizer.json")
  ).read_bytes()
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "dit",
    "tokenizer",
    "umt5",
    "vae",
  ]
  assert len(lines) == 4 and "4 tokens" in lines[3]
  assert (
    f"dit: {sum(a.size for a in tensors('dit').values()):,} parameters in 69 tensors, float32, 0.00"
    in lines[0]
  )
  assert layout.__name__.split("_")[0] in lines[0] and ("bfloat16" in lines[2])


def test_both_layouts_give_the_same_weights(tmp_path):
  for layout in (original_folder, diffusers_folder):
    run(layout(tmp_path / layout.__name__), tmp_path / f"{layout.__name__}-out")
  for kind in PARTS:
    assert (
      len(
        {
          weights.describe(tmp_path / f"{name}_folder-out", kind).fingerprint
          for name in ("original", "diffusers")
        }
      )
      == 1
    )


@pytest.mark.parametrize(
  "prefix", ["model.", "model._fsdp_wrapped_module.", "module._orig_mod.model."]
)
def test_training_checkpoints(tmp_path, prefix):
  named = {prefix + name: array for name, array in tensors("dit").items()}
  path = save(
    {"generator": {k: 2 * v for k, v in named.items()}, "generator_ema": named, "step": 5},
    tmp_path / "hiar.pt",
  )
  lines = run(path, tmp_path / "out")
  assert "entries generator, generator_ema; taking generator_ema" in lines[0] and len(lines) == 2
  assert_holds(tmp_path / "out", "dit")
  run(path, tmp_path / "other", entry="generator")
  assert_holds(tmp_path / "other", "dit", jax.tree.map(lambda leaf: 2 * leaf, params("dit")))


@pytest.mark.parametrize("kind", ["vae", "umt5", "tiny_vae"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_single_files_tell_what_they_are(tmp_path, kind, suffix):
  path = tmp_path / f"weights.{suffix}"
  (save if suffix == "pth" else save_file)(tensors(kind), path)
  run(path, tmp_path / "out")
  assert_holds(tmp_path / "out", kind, params(kind))


def test_one_part_of_a_folder(tmp_path):
  source = original_folder(tmp_path / "source")
  assert len(run(source, tmp_path / "out", kind="vae")) == 1
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["vae"]
  with pytest.raises(UserError, match="--kind=tiny_vae: .*holds nothing of that kind"):
    run(source, tmp_path / "out", kind="tiny_vae")


def test_a_folder_of_one_model(tmp_path):
  source = diffusers_folder(tmp_path / "source") / "vae"
  run(source, tmp_path / "out")
  assert_holds(tmp_path / "out", "vae")


def test_a_folder_without_some_parts_says_so(tmp_path):
  source = original_folder(tmp_path / "source")
  (source / "Wan2.1_VAE.pth").unlink()
  assert "has no vae, which" in run(source, tmp_path / "out")[-1]


def test_casting(tmp_path):
  save_file(tensors("dit"), tmp_path / "a.safetensors")
  run(tmp_path / "a.safetensors", tmp_path / "out", dtype="bfloat16")
  assert_holds(tmp_path / "out", "dit", params("dit", "bfloat16"))
  assert weights.describe(tmp_path / "out", "dit").dtype == "bfloat16"


def test_what_is_complete_is_kept(tmp_path):
  source = original_folder(tmp_path / "source")
  run(source, tmp_path / "out")
  before = tiny_run.files(tmp_path / "out")
  changed = {name: 2 * array for name, array in tensors("dit").items()}
  save_file(changed, source / "diffusion_pytorch_model.safetensors")
  assert all("kept" in line for line in run(source, tmp_path / "out"))
  assert tiny_run.files(tmp_path / "out") == before
  run(source, tmp_path / "out", overwrite=True)
  assert_holds(tmp_path / "out", "dit", jax.tree.map(lambda leaf: 2 * leaf, params("dit")))


def test_a_source_that_fails_leaves_nothing(tmp_path):
  source = original_folder(tmp_path / "source")
  path = source / "Wan2.1_VAE.pth"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match=r"Wan2\.1_VAE\.pth is cut off"):
    run(source, tmp_path / "out")
  assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("kind", PARTS)
def test_sizes_follow_from_the_shapes(tmp_path, kind, layout):
  save_file(tensors(kind, layout), tmp_path / "a.safetensors")
  run(tmp_path / "a.safetensors", tmp_path / "out")
  assert weights.read_config(tmp_path / "out", kind) == CONFIGS[kind]


def test_the_published_tiny_autoencoder(tmp_path):
  """Its sizes are the defaults; only shapes are needed to see it."""
  from hiar_jax.conversion import infer_config
  from hiar_jax.conversion.taehv_keys import tiny_vae_key_map
  from hiar_jax.models.taehv import TinyVAEConfig

  shapes = {rule.name: rule.shape for rule in tiny_vae_key_map(TinyVAEConfig())}
  assert TinyVAEConfig(**infer_config.infer("tiny_vae", "original", shapes, "a")) == TinyVAEConfig()


@pytest.mark.parametrize(
  "sizes",
  [{}, {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}],
  ids=["1.3B", "14B"],
)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_published_models(sizes, layout):
  from hiar_jax.conversion import infer_config

  for kind, config in {
    "dit": dit.DiTConfig(**sizes),
    "vae": vae.VAEConfig(),
    "umt5": umt5.UMT5Config(),
  }.items():
    shapes = {rule.name: rule.shape for rule in published_files.KEY_MAPS[kind](config, layout)}
    assert infer_config.build(kind, infer_config.infer(kind, layout, shapes, "a"), "a") == config


def test_heads(tmp_path):
  config = dataclasses.replace(CONFIGS["dit"], dim=96, num_heads=4)
  save_file(tensors("dit", config=config), tmp_path / "a.safetensors")
  run(tmp_path / "a.safetensors", tmp_path / "given", heads=4)
  assert weights.read_config(tmp_path / "given", "dit") == config
  with pytest.raises(UserError, match="a width of 96 is not whole heads of 128.*--heads"):
    run(tmp_path / "a.safetensors", tmp_path / "unknown")
  (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 8}))
  run(tmp_path / "a.safetensors", tmp_path / "stated")
  assert weights.read_config(tmp_path / "stated", "dit").num_heads == 8
  with pytest.raises(UserError, match="must split into num_heads = 7"):
    run(tmp_path / "a.safetensors", tmp_path / "wrong", heads=7)


def test_the_config_json_beside_the_tensors_counts(tmp_path):
  """A model cut short in its download would else pass as a smaller one."""
  source = original_folder(tmp_path / "source")
  named = load_file(source / "diffusion_pytorch_model.safetensors")
  save_file(
    {k: v for k, v in named.items() if not k.startswith("blocks.1.")},
    source / "diffusion_pytorch_model.safetensors",
  )
  with pytest.raises(UserError, match=r"27 missing \(blocks\.1\."):
    run(source, tmp_path / "out")
  (source / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config\.json is damaged"):
    run(source, tmp_path / "out")


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("blocks.1.ffn.2.bias"), r"1 missing \(blocks\.1\.ffn\.2\.bias\)"),
    (
      lambda t: t.update({"blocks.0.lora": np.zeros(3, np.float32)}),
      r"1 left over \(blocks\.0\.lora\)",
    ),
    (lambda t: t.update({"img_emb.proj.0.bias": np.zeros(3, np.float32)}), r"left over \(img_emb"),
    (
      lambda t: t.update({"head.modulation": np.zeros((1, 3, 256), np.float32)}),
      r"head\.modulation has shape \(1, 3, 256\)",
    ),
    (
      lambda t: t.update({"patch_embedding.weight": np.zeros((256, 9, 1, 2, 2), np.float32)}),
      "takes 9 channels in and gives 4",
    ),
    (
      lambda t: t.update({"blocks.1.ffn.2.bias": np.zeros(256, np.float16)}),
      "is float16, other layers are float32",
    ),
    (lambda t: t.update({"head.head.bias": np.zeros(16, np.int8)}), "tensors of dtype int8"),
    (
      lambda t: t.update({"blocks.999999999.x": np.zeros(3, np.float32)}),
      r"tensors of blocks\.999999999, but none of blocks\.2;",
    ),
    (
      lambda t: t.update({f"blocks.{'9' * 5000}.x": np.zeros(3, np.float32)}),
      r"1 left over \(blocks\.9999",
    ),
    (lambda t: t.update({"blocks.².x": np.zeros(3, np.float32)}), r"1 left over \(blocks\.²"),
    (lambda t: t.pop("blocks.0.ffn.0.weight"), r"tensor blocks\.0\.ffn\.0\.weight is missing"),
    (
      lambda t: t.update({"patch_embedding.weight": np.zeros((256, 16), np.float32)}),
      "expected 5 axes",
    ),
    (
      lambda t: t.clear() or t.update({"a": np.zeros(1, np.float32)}),
      r"its tensors \(a, \.\.\.\) are those of no model",
    ),
  ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
  named = tensors("dit")
  change(named)
  save_file(named, tmp_path / "a.safetensors")
  with pytest.raises(UserError, match=message) as error:
    run(tmp_path / "a.safetensors", tmp_path / "out")
  assert "\n" not in str(error.value) and not (tmp_path / "out" / "dit").exists()


def test_another_kind_than_asked_for(tmp_path):
  save_file(tensors("vae"), tmp_path / "a.safetensors")
  with pytest.raises(
    UserError, match="expected the tensors of kind 'dit', but they are those of kind 'vae'"
  ):
    run(tmp_path / "a.safetensors", tmp_path / "out", kind="dit")


def test_tied_tables(tmp_path):
  """Of the two names of UMT5's table either is enough, both are one too many unless they agree."""
  named = tensors("umt5", "diffusers")
  table = named["shared.weight"]
  save_file({**named, "encoder.embed_tokens.weight": table}, tmp_path / "both.safetensors")
  run(tmp_path / "both.safetensors", tmp_path / "both")
  assert_holds(tmp_path / "both", "umt5", params("umt5"))
  save_file({**named, "encoder.embed_tokens.weight": table + 1}, tmp_path / "two.safetensors")
  with pytest.raises(UserError, match="must be one table"):
    run(tmp_path / "two.safetensors", tmp_path / "two")
  del named["shared.weight"]
  save_file({**named, "encoder.embed_tokens.weight": table}, tmp_path / "other.safetensors")
  run(tmp_path / "other.safetensors", tmp_path / "other")
  assert_holds(tmp_path / "other", "umt5", params("umt5"))


def test_a_damaged_tokenizer(tmp_path):
  source = original_folder(tmp_path / "source")
  (source / "google/umt5-xxl/tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
    run(source, tmp_path / "out")
  assert not (tmp_path / "out/tokenizer").exists()


def test_too_small_a_disk_is_noticed_before(tmp_path, monkeypatch):
  monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
  save_file(tensors("vae"), tmp_path / "a.safetensors")
  with pytest.raises(
    UserError, match=r"disk of .*out/vae \(.* needed, 1000 B free\); nothing was written; free"
  ):
    run(tmp_path / "a.safetensors", tmp_path / "out")


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
  """One layer at a time: 12 of them, and less than two in memory."""
  monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", 1 << 18)
  config = dit.DiTConfig(
    dim=128, ffn_dim=4096, num_heads=1, num_layers=12, channels=4, text_dim=6, freq_dim=8
  )
  path = save(tensors("dit", config=config), tmp_path / "a.pt")
  layer = 4 * (2 * 128 * 4096 + 8 * 128 * 128)
  tracemalloc.start()
  run(path, tmp_path / "out", dtype="bfloat16")
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1.5 * layer < path.stat().st_size / 6


# ------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_the_command(tmp_path, tmp_path_factory):
  source, out = original_folder(tmp_path / "source"), tmp_path / "out"
  (tmp_path / "empty").mkdir()
  whole = (source / "diffusion_pytorch_model.safetensors").read_bytes()
  (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
  cases = [
    (
      [f"--source={source}", f"--out={out}", "--dtype=bfloat16"],
      0,
      "parameters in 69 tensors, bfloat16",
    ),
    (
      [f"--export={out}", "--layout=diffusers", f"--out={tmp_path / 'back'}", "--max_shard=100KB"],
      0,
      "model_index.json ->",
    ),
    ([f"--out={out}"], 2, "give either --source=FILES"),
    ([f"--source={source}", f"--export={out}", f"--out={out}"], 2, "give either --source=FILES"),
    ([f"--source={source}"], 2, "--out is missing"),
    (
      [f"--source={source}", f"--out={out}", "--layout=original"],
      2,
      "--layout=original belongs to --export",
    ),
    (
      [f"--export={out}", f"--out={out}", "--layout=original", "--heads=3"],
      2,
      "--heads=3 belongs to --source",
    ),
    (
      [f"--export={out}", f"--out={out}"],
      2,
      "--layout is missing; give one of original, diffusers",
    ),
    (
      [f"--export={out}", f"--out={tmp_path / 'a'}", "--layout=original", "--max_shard=5 bananas"],
      2,
      "a size such as 5GB",
    ),
    (
      [f"--export={tmp_path / 'empty'}", f"--out={tmp_path / 'a'}", "--layout=original"],
      2,
      "holds nothing to write",
    ),
    ([f"--source={tmp_path / 'nowhere'}", f"--out={out}"], 2, "there is no such file or folder"),
    ([f"--source={tmp_path / 'empty'}", f"--out={out}"], 2, "holds no weights"),
    (
      [f"--source={tmp_path / 'cut.safetensors'}", f"--out={tmp_path / 'a'}"],
      2,
      "cut.safetensors is cut off or damaged",
    ),
    ([f"--source={source}", f"--out={out}", "--dtype=float8"], 2, "dtype"),
    ([f"--source={source}", f"--out={out}", "--sauce=1"], 2, "sauce"),
  ]
  chain = tiny_run.chain(tmp_path_factory.getbasetemp())
  for (arguments, status, text), found in zip(
    cases, chain.commands([("hiar_jax.convert", case[0]) for case in cases]), strict=True
  ):
    code, printed, errors = found
    assert code == status and text in (errors if status else printed), (arguments, found)
    assert not status or len(errors.strip().splitlines()) == 1, (arguments, errors)
