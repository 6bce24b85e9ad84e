"""The page of what lies on disk (checkpoints/on_disk.py), compared with files."""

from collections.abc import Iterable
import pathlib
import re

from hiar_jax.checkpoints import on_disk


def entries(section: str) -> dict[str, re.Pattern]:
  """{name on the page: pattern of the paths it stands for} of a section."""
  found, current = {}, ""
  for line in on_disk.__doc__.splitlines():
    if re.match(r"[A-Z]\w+ \(", line):
      current = line.split()[0]
    if current == section and re.fullmatch(r" {4}\S+", line):
      pattern = re.sub(r"<\w+>", "[^/]+", re.escape(line.strip()))
      found[line.strip()] = re.compile(pattern + (".+" if line.endswith("/") else ""))
  assert found, f"no section {section}"
  return found


def files_below(directory: pathlib.Path) -> list[str]:
  return [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]


def differences(section: str, files: Iterable[str]) -> tuple[set[str], set[str]]:
  """(files that the page does not name, names on the page without a file)."""
  page, files = entries(section), set(files)
  described = {file for file in files if any(p.fullmatch(file) for p in page.values())}
  used = {name for name, p in page.items() if any(p.fullmatch(file) for file in files)}
  return files - described, page.keys() - used
