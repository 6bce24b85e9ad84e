"""The captions of a folder of videos: those of `metadata.jsonl` or `metadata.csv` in it (columns
file, caption) if there is one, else of `name.txt` beside `name.mp4`.
"""

from collections.abc import Iterable
import dataclasses
import os
import pathlib

from hiar_jax.data.list_file import ListFile
from hiar_jax.errors import UserError
from hiar_jax.files import is_whole, read_text
from hiar_jax.video.video_file import Unusable

METADATA = ("metadata.jsonl", "metadata.csv")
_EXAMPLE = '{"file": "a.mp4", "caption": "a cat"}'


@dataclasses.dataclass(frozen=True)
class Captions:
  """listed: file -> its captions in the metadata, {} without metadata. texts: path without its
  ending -> the text file of that name. All paths start at the folder.
  """

  folder: pathlib.Path
  listed: dict[str, list[str]]
  texts: dict[str, str]

  @classmethod
  def read(cls, folder: pathlib.Path, files: Iterable[str]) -> "Captions":
    """files: all of the folder. Raises UserError, with the line, for bad metadata."""
    # sorted: where there are a.TXT and a.txt, the latter is taken
    texts = {os.path.splitext(x)[0]: x for x in sorted(files) if x.lower().endswith(".txt")}
    return cls(folder, read_captions(folder), texts)

  def of(self, name: str) -> list[str]:
    """Returns the captions of a file, at least one.

    Raises:
      Unusable: no such video file, no caption, or one that is no text.
    """
    if not (self.folder / name).is_file():
      raise Unusable("named in the metadata, but not there")
    found, place = self.listed.get(name, []), "in the metadata"
    if not self.listed:
      text = self.texts.get(os.path.splitext(name)[0])
      if text is None:
        raise Unusable(f"no caption: there is no {pathlib.Path(name).stem}.txt beside it")
      found, place = [self._read(text)], f"in {pathlib.Path(text).name}"
    if not any(found):
      raise Unusable(f"no caption {place}")
    if not all(map(is_whole, found)):
      raise Unusable(f"its caption {place} holds half a character (half an emoji)")
    return [caption for caption in found if caption]

  def _read(self, name: str) -> str:
    try:
      return " ".join(read_text(self.folder / name).split())
    except UserError:
      raise Unusable(f"its caption {pathlib.Path(name).name} is not UTF-8 text") from None


def read_captions(folder: pathlib.Path) -> dict[str, list[str]]:
  """Returns {file: its captions, each once} of the folder's metadata; {} without any.

  Raises:
    UserError: a row that cannot be read, lacks a column, or whose caption is no text; names the
      line.
  """
  captions: dict[str, list[str]] = {}
  for path in (folder / name for name in METADATA):
    metadata = ListFile(path, "metadata", ("file", "caption"), _EXAMPLE)
    for line, row in metadata.rows() if path.exists() else ():
      file, caption = row.get("file"), row.get("caption")
      if not isinstance(file, str):
        raise metadata.wrong(line, f"expected the columns file and caption, found {', '.join(row)}")
      if not isinstance(caption, str | None):
        raise metadata.wrong(line, f"caption = {caption!r}: expected text")
      of_file = captions.setdefault(os.path.normpath(file), [])
      caption = (caption or "").strip()
      if caption not in of_file:
        of_file.append(caption)
  return captions
