"""Text embeddings: what the encoder gives, encoded once, kept without padding; the encoder is in
memory only while it is needed.
"""

from concurrent import futures
import functools

import jax
import numpy as np
import pytest
import safetensors

from hiar_jax.checkpoints import weights
from hiar_jax.components import umt5_encoder, umt5_tokenizer
from hiar_jax.components.umt5_encoder import TextCache
from hiar_jax.errors import UserError
from hiar_jax.models import umt5
from tests.helpers.compiling import quick_jit
from tests.helpers.small_tokenizer import save_small_tokenizer, small_tokenizer

CONFIG = umt5.UMT5Config(vocab=200, dim=16, dim_attn=24, dim_ffn=20, num_heads=3, num_layers=2)
LENGTH = 160  # buckets of 64, 128 and 160 tokens
# the last is the first
PROMPTS = [
  "A cat walks on the grass",
  "",
  "一只狗在海滩上奔跑",
  "A dog runs " * 15,
  "A cat  walks on\nthe grass ",
]


def _params(seed=0):
  params = jax.device_get(quick_jit(functools.partial(umt5.init, CONFIG))(jax.random.key(seed)))
  return jax.tree.map(
    lambda leaf: (
      leaf + 0.1 * np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32)
    ),
    params,
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("weights")
  weights.save(path, "umt5", CONFIG, _params())
  save_small_tokenizer(path / "tokenizer")
  return path


@pytest.fixture
def loaded(monkeypatch):
  """The parameter trees that were loaded, in order."""
  trees, load = [], weights.load

  def spy(*args, **kwargs):
    config, params = load(*args, **kwargs)
    trees.append(params)
    return config, params

  monkeypatch.setattr(umt5_encoder.weights, "load", spy)
  return trees


def _cache(folder, directory, **changes):
  return TextCache(folder, directory, **{"dtype": "float32", "length": LENGTH, **changes})


def _files(directory):
  return sorted(directory.glob("*/*.safetensors"))


def test_the_texts_are_the_encoders(folder, tmp_path):
  tokens = umt5_tokenizer.Tokenizer(folder, LENGTH)(PROMPTS)
  counts = tokens.mask.sum(axis=1)
  assert sorted(-(-counts // 64)) == [1, 1, 1, 1, 2] and not any(tokens.cut)
  # padded to the full length, all at once
  expected = np.asarray(umt5.encode_text(_params(), tokens.ids, tokens.mask, CONFIG))
  text = _cache(folder, tmp_path).tokens(PROMPTS)
  assert text.shape == (5, LENGTH, 16) and text.dtype == np.float32
  np.testing.assert_allclose(text, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert all(
    (row[count:] == 0).all() and (np.abs(row[:count]).max(axis=-1) > 0).all()
    for row, count in zip(text, counts, strict=True)
  )


def test_the_encoder_is_loaded_for_new_prompts_alone_and_freed(folder, tmp_path, loaded):
  cache = _cache(folder, tmp_path)
  assert cache.missing(PROMPTS) == [PROMPTS[4], *PROMPTS[1:4]]
  first = cache.tokens(PROMPTS)
  assert len(loaded) == 1 and len(_files(tmp_path)) == 4
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(loaded[0]))
  again = _cache(folder, tmp_path).tokens(PROMPTS[::-1])  # another process, another order
  assert len(loaded) == 1 and not cache.missing(PROMPTS)
  np.testing.assert_array_equal(again, first[::-1])
  cache.tokens([*PROMPTS, "moon"])
  assert len(loaded) == 2 and len(_files(tmp_path)) == 5


def test_what_is_cut_off_a_prompt_is_said(folder, tmp_path, loaded):
  """The stream's page and the commands print these lines; nothing is encoded for them."""
  cache = _cache(folder, tmp_path, length=12)
  tokens = umt5_tokenizer.Tokenizer(folder, 1000)(["A dog runs " * 15])
  count = int(tokens.mask.sum())
  (line,) = cache.warnings("A dog runs " * 15)
  assert line.startswith("prompt 'A dog runs A dog") and len(line) < 200
  assert line.endswith(f"{count} tokens, the encoder reads 12; the last {count - 12} are left out")
  assert cache.warnings("A cat") == [] and not loaded


def test_a_prompt_does_not_depend_on_the_others(folder, tmp_path):
  together = _cache(folder, tmp_path / "together").tokens(PROMPTS)
  for prompt, text in zip(PROMPTS, together, strict=True):
    np.testing.assert_array_equal(_cache(folder, tmp_path / "alone").tokens([prompt])[0], text)


def test_every_batch_of_a_length_has_one_shape(folder, tmp_path, monkeypatch):
  """Other shapes might round otherwise, and would be compiled anew."""
  shapes = []

  def encode(params, ids, mask, config):
    shapes.append(ids.shape)
    return jax.numpy.ones((*ids.shape, 16))

  monkeypatch.setattr(umt5, "encode_text", encode)
  for prompts in (PROMPTS, ["moon"]):
    _cache(folder, tmp_path).tokens(prompts)
  assert shapes == [(4, 64), (4, 128), (4, 64)]


def test_padding_is_not_stored(folder, tmp_path):
  _cache(folder, tmp_path).tokens(PROMPTS[:1])
  (path,) = _files(tmp_path)
  with safetensors.safe_open(path, "numpy") as file:
    assert file.metadata() == {"prompt": PROMPTS[0]}
    assert file.get_tensor("text").shape == (len(small_tokenizer().encode(PROMPTS[0]).ids), 16)


def test_bfloat16(folder, tmp_path, loaded):
  text = _cache(folder, tmp_path, dtype="bfloat16").tokens(PROMPTS)
  assert text.dtype == jax.numpy.bfloat16 and {
    leaf.dtype for leaf in jax.tree.leaves(loaded[0])
  } == {text.dtype}
  exact = _cache(folder, tmp_path).tokens(PROMPTS)
  # By mean squares: the small tokenizer numbers its words anew in every process, and the largest
  # error of a handful of tokens moves between .03 and .09 of the largest value with them.
  rms = lambda x: np.sqrt(np.mean(np.square(x, dtype=np.float64)))
  assert 0.002 < rms(text.astype(np.float32) - exact) / rms(exact) < 0.05


@pytest.mark.slow
def test_other_encoders_have_other_texts(folder, tmp_path, loaded):
  """Weights, tokenizer, dtype or length: each changes the numbers, none may be mixed up with
  another.
  """
  other = tmp_path / "weights"
  weights.save(other, "umt5", CONFIG, _params(1))
  written = save_small_tokenizer(other / "tokenizer")
  caches = [_cache(folder, tmp_path), _cache(other, tmp_path)]
  caches += [_cache(folder, tmp_path, length=32), _cache(folder, tmp_path, dtype="bfloat16")]
  texts = [cache.rows("moon") for cache in caches if cache.prepare(["moon"]) is None]
  written.write_bytes(written.read_bytes() + b"\n")
  caches.append(_cache(other, tmp_path))
  assert caches[-1].missing(["moon"])
  assert len(loaded) == 4 and len({cache.identity for cache in caches}) == 5
  assert np.abs(texts[0] - texts[1]).max() > 0.1
  same = _cache(folder, tmp_path)
  assert not same.missing(["moon"])


def test_a_stop_keeps_what_is_done(folder, tmp_path, monkeypatch):
  encode, calls = umt5.encode_text, []

  def stops(*args):
    calls.append(args)
    if len(calls) > 1:  # traced once a length: short prompts are done by then
      raise KeyboardInterrupt
    return encode(*args)

  cache = _cache(folder, tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(umt5, "encode_text", stops)
    with pytest.raises(KeyboardInterrupt):
      cache.prepare(PROMPTS)
  assert cache.missing(PROMPTS) == [PROMPTS[3]]
  cache.prepare(PROMPTS)
  assert not cache.missing(PROMPTS)


def test_long_prompts_are_cut_and_that_can_be_said(folder, tmp_path, capsys):
  """By whoever has asked: a command, the data stage or the page."""
  long = "A cat walks on the grass. " * 40
  count = len(small_tokenizer().encode(long.strip()).ids)
  cache = _cache(folder, tmp_path)
  assert (cache.tokens([long, "moon", long])[0, -1] != 0).any()
  assert cache.warnings("moon") == [] and not capsys.readouterr().out
  assert cache.warnings(long) == [
    f"prompt {long[:60]!r}...: {count} tokens, the encoder reads 160; the last {count - 160} are "
    "left out"
  ]


def test_a_traced_step_may_ask(folder, tmp_path, loaded):
  cache = _cache(folder, tmp_path)
  add = jax.jit(lambda x: x + cache.tokens(["moon"]))
  np.testing.assert_allclose(
    add(np.ones((1, LENGTH, 16), np.float32)), 1 + cache.tokens(["moon"]), rtol=0, atol=1e-6
  )
  assert len(loaded) == 1


def test_a_mesh_around_it_changes_nothing(folder, tmp_path):
  """The encoder is on one device, the network that waits for the text on all."""
  with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
    text = _cache(folder, tmp_path / "inside").tokens(["moon"])
  np.testing.assert_array_equal(text, _cache(folder, tmp_path / "outside").tokens(["moon"]))


def test_threads_load_one_encoder(folder, tmp_path, loaded):
  cache = _cache(folder, tmp_path)
  with futures.ThreadPoolExecutor(4) as pool:
    texts = list(pool.map(lambda prompt: cache.tokens([prompt])[0], ["moon"] * 8))
  assert len(loaded) == 1 and all((text == texts[0]).all() for text in texts)


def test_a_damaged_file_is_named_and_made_anew(folder, tmp_path):
  cache = _cache(folder, tmp_path)
  text = cache.tokens(["moon"])
  (path,) = _files(tmp_path)
  whole = path.read_bytes()
  for content in (b"", whole[:50], whole[:-4]):
    path.write_bytes(content)
    with pytest.raises(
      UserError, match=f"{path.name} is damaged .* was removed; run again"
    ) as error:
      cache.tokens(["moon"])
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(cache.tokens(["moon"]), text)


def test_bad_input(folder, tmp_path):
  with pytest.raises(UserError, match="expected one of float32, bfloat16"):
    _cache(folder, tmp_path, dtype="float16")
  with pytest.raises(UserError, match="batch = 0"):
    _cache(folder, tmp_path, batch=0)
  with pytest.raises(UserError, match="umt5"):
    _cache(tmp_path, tmp_path)
  with pytest.raises(UserError, match="'moon' is not in .*; encode it first"):
    _cache(folder, tmp_path).rows("moon")


def test_weights_that_give_no_numbers(tmp_path):
  broken = jax.tree.map(lambda leaf: leaf * np.float32("nan"), _params())
  weights.save(tmp_path, "umt5", CONFIG, broken)
  save_small_tokenizer(tmp_path / "tokenizer")
  with pytest.raises(UserError, match="'moon' is not finite in float32"):
    _cache(tmp_path, tmp_path / "texts").prepare(["moon"])
  assert not _files(tmp_path / "texts")
