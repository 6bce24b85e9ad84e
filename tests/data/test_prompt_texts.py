"""A prompts file becomes a data set of texts: in order, unpadded, built once, resumed where it was
stopped.
"""

import grain
import jax
import ml_dtypes
import numpy as np
import pytest

from hiar_jax.data import prompt_texts, tfds_builder
from hiar_jax.errors import UserError

PROMPTS = [
  *(f"prompt number {i}, " * (1 + i % 4) for i in range(9)),
  "一只猫 🐈",
  "prompt number 0, ",
]
DIM = 6


def _text(prompt, dtype=ml_dtypes.bfloat16):
  return (
    np.random.default_rng(list(prompt.encode()))
    .normal(size=(1 + len(prompt.split()), DIM))
    .astype(dtype)
  )


class Texts:
  """Encodes by drawing numbers, and remembers; may be made to stop."""

  def __init__(self, identity="one", dtype=ml_dtypes.bfloat16, stop=None):
    self.identity, self.dtype, self.stop, self.done = identity, dtype, stop, {}

  def prepare(self, prompts):
    for prompt in prompts:
      if prompt.strip() not in self.done:
        if self.stop is not None and len(self.done) >= self.stop:
          raise KeyboardInterrupt
        self.done[prompt.strip()] = _text(prompt.strip(), self.dtype)

  def rows(self, prompt):
    return self.done[prompt.strip()]


@pytest.fixture
def prompts_file(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("# a comment\n" + "\n".join(PROMPTS) + "\n", encoding="utf-8")
  return path


def _check(directory, dtype=ml_dtypes.bfloat16):
  source = tfds_builder.open_source(directory)
  assert len(source) == len(PROMPTS)
  for prompt, record in zip(PROMPTS, source, strict=True):
    expected = _text(prompt.strip(), dtype)
    assert record["caption"].decode() == prompt.strip()
    assert record["text"].dtype == dtype and record["text"].shape == expected.shape
    assert record["text"].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_every_prompt_in_order(dtype, prompts_file, tmp_path):
  prompt_texts.prepare(tmp_path / "texts", prompts_file, Texts(dtype=dtype))
  _check(tmp_path / "texts", dtype)


def test_done_is_done(prompts_file, tmp_path):
  prompt_texts.prepare(tmp_path / "texts", prompts_file, Texts())
  prompt_texts.prepare(tmp_path / "texts", prompts_file, Texts(stop=0))
  _check(tmp_path / "texts")


def test_a_stop_anywhere_resumes(prompts_file, tmp_path, monkeypatch):
  directory, texts = tmp_path / "texts", Texts(stop=4)
  with pytest.raises(KeyboardInterrupt):  # while encoding
    prompt_texts.prepare(directory, prompts_file, texts)
  assert len(texts.done) == 4 and not tfds_builder.is_complete(directory)
  texts.stop = 10  # what is left: ten prompts are different
  with monkeypatch.context() as patch:  # while writing
    build = tfds_builder.build
    patch.setattr(
      tfds_builder,
      "build",
      lambda directory, name, features, examples, **sizes: build(
        directory, name, features, _stopping(examples), **sizes
      ),
    )
    with pytest.raises(KeyboardInterrupt):
      prompt_texts.prepare(directory, prompts_file, texts)
  assert not tfds_builder.is_complete(directory)
  prompt_texts.prepare(directory, prompts_file, texts)
  _check(directory)


def _stopping(examples):
  yield next(examples)
  yield next(examples)
  raise KeyboardInterrupt


def test_shards_are_of_even_size(prompts_file, tmp_path, monkeypatch):
  mean = np.mean([_text(prompt.strip()).nbytes for prompt in PROMPTS])
  monkeypatch.setattr(tfds_builder, "_SHARD_BYTES", int(4 * mean))
  prompt_texts.prepare(tmp_path / "texts", prompts_file, Texts())
  assert len(list((tmp_path / "texts").glob("**/*.array_record*"))) == 3
  _check(tmp_path / "texts")


def test_grain_reads_batches(prompts_file, tmp_path):
  prompt_texts.prepare(tmp_path / "texts", prompts_file, Texts())
  length = max(len(_text(prompt.strip())) for prompt in PROMPTS)
  batches = (
    grain.MapDataset.source(tfds_builder.open_source(tmp_path / "texts"))
    .map(lambda record: {**record, "text": prompt_texts.pad([record["text"]], length)[0]})
    .batch(5)
  )
  batch = batches[0]
  assert batch["text"].shape == (5, length, DIM) and batch["text"].dtype == ml_dtypes.bfloat16
  for prompt, text in zip(PROMPTS, batch["text"], strict=False):
    rows = _text(prompt.strip())
    assert (text[: len(rows)] == rows).all() and (text[len(rows) :] == 0).all()
  assert jax.numpy.asarray(batch["text"]).dtype == jax.numpy.bfloat16


def test_another_file_or_encoder_is_refused(prompts_file, tmp_path):
  prompt_texts.prepare(tmp_path / "texts", prompts_file, Texts())
  with pytest.raises(UserError, match="encoder='one'.*encoder='other'"):
    prompt_texts.prepare(tmp_path / "texts", prompts_file, Texts("other"))
  prompts_file.write_text("\n".join(reversed(PROMPTS)), encoding="utf-8")
  with pytest.raises(UserError, match="digest="):
    prompt_texts.prepare(tmp_path / "texts", prompts_file, Texts())


def test_texts_that_are_too_long():
  with pytest.raises(UserError, match="a text of 5 tokens does not fit into 4"):
    prompt_texts.pad([np.ones((5, 2))], 4)
