"""A tokenizer of UMT5's kind, small enough to be trained in a test: Unigram over many scripts,
bytes for what it does not know.
"""

import functools
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
  "A cat walks on the grass, realistic style.",
  "A dog runs along the beach at sunset while waves roll in.",
  "Ein Hund läuft über die schöne grüne Wiese.",
  "一只猫在草地上行走，写实风格。",
  "一只狗在海滩上奔跑，夕阳西下。",
  "قطة تمشي على العشب في الصباح",
  "кошка идёт по траве",
  "🐈 🌊 👩‍🚀 moon",
]


@functools.cache
def small_tokenizer() -> tokenizers.Tokenizer:
  """Its first tokens are UMT5's: <pad> 0, </s> 1, <unk> 2."""
  tokenizer = tokenizers.Tokenizer(models.Unigram())
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  special = ["<pad>", "</s>", "<unk>"]
  trainer = trainers.UnigramTrainer(
    vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
  )
  tokenizer.train_from_iterator(CORPUS * 4, trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
    single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
  )
  return tokenizer


def save_small_tokenizer(folder: pathlib.Path) -> pathlib.Path:
  """Writes `<folder>/tokenizer.json`."""
  folder.mkdir(parents=True, exist_ok=True)
  small_tokenizer().save(str(folder / "tokenizer.json"))
  return folder / "tokenizer.json"
