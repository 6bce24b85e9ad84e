"""diffusers' Wan models with small random weights: the same numbers, and weights that go there and
back through this project's files.

Needs the extra `[parity]` (torch, diffusers, transformers, and accelerate, without which diffusers
loads no Wan transformer).
"""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hiar_jax.checkpoints import weights
from hiar_jax.conversion.export import export
from hiar_jax.convert import convert
from hiar_jax.models import dit
from tests.helpers import published_files

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn

SIZES = {  # num_heads, head width, layers, ...: no two alike
  "narrow": dict(
    num_attention_heads=3,
    attention_head_dim=12,
    num_layers=2,
    ffn_dim=40,
    text_dim=7,
    freq_dim=10,
    in_channels=5,
  ),
  "heads of 128": dict(
    num_attention_heads=2,
    attention_head_dim=128,
    num_layers=1,
    ffn_dim=24,
    text_dim=6,
    freq_dim=8,
    in_channels=4,
  ),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"

loads = pytest.mark.skipif(
  importlib.util.find_spec("accelerate") is None,
  reason="the extra [parity] is not installed (accelerate)",
)


def randomise(model):
  """Gains of one, biases of zero and closed gates would hide mistakes."""
  import torch

  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.2 * torch.randn_like(parameter)
  return model.eval()


@pytest.fixture(scope="module", params=list(SIZES))
def peer(request):
  import diffusers

  sizes = SIZES[request.param]
  return randomise(diffusers.WanTransformer3DModel(out_channels=sizes["in_channels"], **sizes))


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
  path = tmp_path_factory.mktemp("transformer")
  peer.save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
  path = tmp_path_factory.mktemp("weights")
  list(convert(str(folder), str(path)))
  return path


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 6), (3, 8, 4)])
def test_forward(peer, converted, frames, height, width):
  import torch

  config, params = weights.load(converted, "dit")
  generator = np.random.default_rng(0)
  x = generator.normal(size=(2, frames, height, width, config.channels)).astype(np.float32)
  text = generator.normal(size=(2, 9, config.text_dim)).astype(np.float32)
  timestep = np.asarray([731.0, 12.0], np.float32)
  with torch.no_grad():
    peers = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    expected = peer(peers, torch.from_numpy(timestep), torch.from_numpy(text)).sample.numpy()
  forward = jax.jit(lambda *args: dit.DiT(config).apply({"params": params}, *args)[0])
  velocity = forward(x, np.repeat(timestep[:, None], frames, 1), text, jnp.arange(frames))
  expected = np.moveaxis(expected, 1, -1)
  assert velocity.shape == expected.shape
  assert np.abs(velocity - expected).max() <= 1e-4 * np.abs(expected).max()


@loads
def test_weights_go_back_and_load(peer, folder, converted, tmp_path):
  import diffusers

  list(export(converted, "diffusers", tmp_path))
  back, original = load_file(tmp_path / "transformer" / WEIGHTS), load_file(folder / WEIGHTS)
  assert back.keys() == original.keys()
  assert all(back[name].tobytes() == array.tobytes() for name, array in original.items())
  loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
  assert all(
    (loaded.state_dict()[name] == tensor).all() for name, tensor in peer.state_dict().items()
  )
  sizes = lambda model: json.loads(
    json.dumps({name: value for name, value in model.config.items() if not name.startswith("_")})
  )
  assert sizes(loaded) == sizes(peer)


@loads
def test_shards_load(peer, converted, tmp_path):
  import diffusers

  list(export(converted, "diffusers", tmp_path, max_shard=50_000))
  assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
  loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer").state_dict()
  assert all((loaded[name] == tensor).all() for name, tensor in peer.state_dict().items())


# ------------------------------------------------------------------- the other parts, and the whole


def _save_peers(folder):
  """Every model of a pipeline, small, saved as diffusers and transformers do."""
  import diffusers
  import transformers

  c = published_files.CONFIGS
  t = c["umt5"]
  transformer = diffusers.WanTransformer3DModel(out_channels=4, **SIZES["heads of 128"])
  vae = diffusers.AutoencoderKLWan(
    base_dim=c["vae"].dim,
    z_dim=c["vae"].z_dim,
    dim_mult=list(c["vae"].dim_mult),
    num_res_blocks=1,
    temperal_downsample=[True],
  )
  text = transformers.UMT5EncoderModel(
    transformers.UMT5Config(
      vocab_size=t.vocab,
      d_model=t.dim,
      d_kv=t.dim_attn // t.num_heads,
      d_ff=t.dim_ffn,
      num_layers=t.num_layers,
      num_heads=t.num_heads,
      feed_forward_proj="gated-gelu",
      relative_attention_num_buckets=t.num_buckets,
    )
  )
  models = {"transformer": transformer, "vae": vae, "text_encoder": text}
  for name, model in models.items():
    randomise(model).save_pretrained(folder / name)
  published_files.save_tokenizer(folder / "tokenizer" / "tokenizer.json")
  return models


@loads
def test_a_pipeline_goes_there_and_back(tmp_path):
  """From folders that the peers wrote, to weights here, to a folder that the published pipeline
  loads as a whole.
  """
  import diffusers

  models = _save_peers(tmp_path / "source")
  list(convert(str(tmp_path / "source"), str(tmp_path / "weights")))
  lines = list(export(tmp_path / "weights", "diffusers", tmp_path / "back"))
  assert lines[-1].startswith("model_index.json")
  pipeline = diffusers.WanPipeline.from_pretrained(tmp_path / "back")
  for name, model in models.items():
    loaded = getattr(pipeline, name).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all((loaded[key] == tensor).all() for key, tensor in model.state_dict().items()), name
    for path in (tmp_path / "source" / name).glob("*.safetensors"):
      back, original = load_file(tmp_path / "back" / name / path.name), load_file(path)
      assert back.keys() == original.keys() and all(
        back[key].tobytes() == array.tobytes() for key, array in original.items()
      )
  assert pipeline.tokenizer("a").input_ids[0] == 3 and pipeline.scheduler.config.flow_shift == 3.0


@loads
def test_the_original_names_are_those_of_the_published_model(tmp_path):
  """diffusers converts the original names itself when it loads a single file."""
  import diffusers

  config = published_files.CONFIGS["dit"]
  weights.save(tmp_path / "weights", "dit", config, published_files.params("dit"))
  list(export(tmp_path / "weights", "original", tmp_path / "original"))
  list(export(tmp_path / "weights", "diffusers", tmp_path / "back"))
  assert (
    json.loads((tmp_path / "original" / "config.json").read_text())["_class_name"] == "WanModel"
  )
  model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "back" / "transformer")
  loaded = diffusers.WanTransformer3DModel.from_single_file(
    str(tmp_path / "original" / WEIGHTS), config=str(tmp_path / "back"), subfolder="transformer"
  )
  assert all(
    (loaded.state_dict()[name] == tensor).all() for name, tensor in model.state_dict().items()
  )
