"""Runs one command under a profile hook and writes down what `benchmarks.walks` counts.

That starts it, in a process of its own. No module, class or function of the package is named here:
values are recognised by sizes that occur nowhere else in the run (`Sizes`), the package's functions
by the folder that their code lies in, and the network by flax: it is the module of the package
whose `apply` is given latents and a text.
"""

import collections
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import runpy
import sys
import threading
import types

import flax.linen as nn
import jax
import numpy as np

LOOKS = 80  # calls and returns of a pair of functions that are looked at in a phase
NODES = 3000  # values that are looked at in one call's arguments
DEPTH = 10  # containers in containers
SHORTEST, LONGEST = 10, 2000  # characters of a string in which a prompt is looked for
COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>"}  # have no frames from Python 3.12 on
NUMBERS = types.NoneType | bool | int | float
ARRAYS = np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What nothing else in the run has: tokens of a prompt, latents [h w c], a frame's side."""

  text: int
  latents: tuple[int, int, int]
  frame: int

  def kind(self, shape: tuple[int, ...]) -> str | None:
    """Of an array: `text:n` where an axis is as long as a prompt, n the longest axis before it (1
    if there is none); `latents` [... h w c], noise included; `frames` [... H W 3], enlarged or not;
    None for any other."""
    if self.text in shape:
      return f"text:{max(shape[: shape.index(self.text)], default=1)}"
    if shape[-3:] == self.latents:
      return "latents"
    square = len(shape) >= 3 and shape[-1] == 3 and shape[-2] == shape[-3]
    return "frames" if square and shape[-2] and shape[-2] % self.frame == 0 else None


class Holdings:
  """Says which kinds of arrays and which strings a value holds.

  Looked into are containers, dataclasses, closures, bound methods, partials, suspended generators
  and the attributes of the package's own objects, but for cached properties: those an object was
  not given. is_own: file name -> whether the package's code lies there.
  """

  def __init__(self, sizes: Sizes, is_own):
    self._sizes, self._is_own = sizes, is_own

  def arrays(self, value) -> list:
    """Every array in it."""
    return [leaf for leaf in self._leaves(value) if isinstance(leaf, ARRAYS)]

  def of(self, value) -> set[tuple[str, str]]:
    """Of its arrays ("array", kind), of its strings ("string", all of it)."""
    found = set()
    for leaf in self._leaves(value):
      if isinstance(leaf, str):
        found.add(("string", leaf))
      elif kind := self._sizes.kind(tuple(leaf.shape)):
        found.add(("array", kind))
    return found

  def _leaves(self, value):
    seen, queue = {}, collections.deque([(value, 0)])
    while queue and len(seen) < NODES:
      value, depth = queue.popleft()
      if isinstance(value, str | bytes):
        text = value if isinstance(value, str) else value[:LONGEST].decode(errors="ignore")
        if len(text) >= SHORTEST:
          yield text[:LONGEST]
      elif not isinstance(value, NUMBERS) and id(value) not in seen:
        seen[id(value)] = value  # kept, so that its id is not given to another
        if isinstance(value, ARRAYS) and not _is_strings(value):
          yield value
        elif depth < DEPTH:
          queue.extend((part, depth + 1) for part in self._parts(value))

  def _parts(self, value) -> list:
    match value:
      case dict():
        return [*value.keys(), *value.values()]
      case list() | tuple() | set() | frozenset() | collections.deque():
        return list(value)[:64]
      case np.ndarray():
        return value.ravel()[:64].tolist()
      case functools.partial():
        return [value.func, *value.args, *value.keywords.values()]
      case types.MethodType():
        return [value.__self__, value.__func__]
      case types.FunctionType():
        return self._closure(value)
      case types.GeneratorType():
        own = value.gi_frame is not None and self._is_own(value.gi_code.co_filename)
        return list(value.gi_frame.f_locals.values()) if own else []
      case type() | types.ModuleType():
        return []
    if dataclasses.is_dataclass(value):
      return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return [*self._attributes(value), getattr(value, "__wrapped__", None)]  # of what jit returns

  def _closure(self, function: types.FunctionType) -> list:
    cells = function.__closure__ or () if self._is_own(function.__code__.co_filename) else ()
    return [*filter(None, map(_content, cells)), getattr(function, "__wrapped__", None)]

  def _attributes(self, value) -> list:
    kind = type(value)
    if not self._is_own(_file_of(kind)):
      return []
    given = lambda name: not isinstance(getattr(kind, name, None), functools.cached_property)
    return [part for name, part in getattr(value, "__dict__", {}).items() if given(name)]


def _file_of(kind: type) -> str:
  """Where a class is written; '' where that is no file."""
  return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""


def _is_strings(array) -> bool:
  return isinstance(array, np.ndarray) and array.dtype.kind in "OSU"


def _content(cell) -> tuple:
  """(what a closure's cell holds,), or () while it holds nothing."""
  try:
    return (cell.cell_contents,)
  except ValueError:
    return ()


class Recorder:
  """The hook, and what it has seen.

  applies: of every call of the network the phase, its class, the batch of the latents that it was
  given, and the package's frames above it, outermost first.
  calls: (phase, caller, callee) -> when which kinds and strings were first seen in the callee's
  arguments (`given`) and in its result (`returned`).

  A phase ends where jax has traced a function in which the network was applied.
  until (batch, count): the command is ended once that many phases of other stacks have applied it
  to that batch.
  """

  def __init__(self, package: pathlib.Path, sizes: Sizes, until: tuple[int, int] | None = None):
    self._prefix, self._root = f"{package}{os.sep}", package.parent
    self._sizes, self._holdings = sizes, Holdings(sizes, self._is_own)
    self._names, self._inside = {}, threading.local()
    self._phase, self._traced, self._order, self._until = 0, None, 0, until
    self._stopped = False
    self.applies, self.calls = [], {}

  def start(self) -> None:
    """From now on, in this thread and in those that are started."""
    apply = nn.Module.apply

    @functools.wraps(apply)
    def recorded(module, *args, **kwargs):
      outermost = not getattr(self._inside, "apply", False)
      if outermost and self._is_own(_file_of(type(module))):
        self._record_apply(type(module), (args, kwargs), sys._getframe(1))
      self._inside.apply = True
      try:
        return apply(module, *args, **kwargs)
      finally:
        self._inside.apply = not outermost

    nn.Module.apply = recorded
    threading.setprofile(self._hook)
    sys.setprofile(self._hook)

  def stop(self) -> None:
    """Also in threads that are still at work."""
    self._stopped = True
    threading.setprofile(None)
    sys.setprofile(None)

  def _is_own(self, file: str) -> bool:
    return file.startswith(self._prefix)

  def _name(self, frame) -> tuple[str, str]:
    """(file, from the package's parent on; function)"""
    code = frame.f_code
    if code not in self._names:
      file = pathlib.Path(code.co_filename).relative_to(self._root).as_posix()
      self._names[code] = (file, code.co_qualname.replace(".<locals>", ""))
    return self._names[code]

  def _own_frames(self, frame):
    """Innermost first; a comprehension is part of its function."""
    while frame is not None:
      code = frame.f_code
      if code.co_filename.startswith(self._prefix) and code.co_name not in COMPREHENSIONS:
        yield frame
      frame = frame.f_back

  def _record_apply(self, kind: type, arguments, frame) -> None:
    shapes = [tuple(array.shape) for array in self._holdings.arrays(arguments)]
    clips = [shape for shape in shapes if len(shape) == 5 and self._sizes.kind(shape) == "latents"]
    if not clips or not any(self._sizes.text in shape for shape in shapes):
      return
    frames = list(self._own_frames(frame))[::-1]
    self._traced = next((f for f in frames if f.f_back and _is_of_jax(f.f_back)), None)
    self.applies.append(
      {
        "phase": self._phase,
        "class": kind.__name__,
        "batch": clips[0][0],
        "frames": [self._name(f) for f in frames],
      }
    )

  def _hook(self, frame, event, arg) -> None:
    if event != "call" and event != "return":
      return
    code = frame.f_code
    if not code.co_filename.startswith(self._prefix) or self._stopped:
      return
    is_function = code.co_flags & inspect.CO_OPTIMIZED and code.co_name not in COMPREHENSIONS
    if is_function and not getattr(self._inside, "apply", False):
      self._record_call(frame, event, frame.f_locals if event == "call" else arg)
    if event == "return" and frame is self._traced:
      self._end_phase()

  def _record_call(self, frame, event: str, value) -> None:
    caller = next(self._own_frames(frame.f_back), None)
    key = (self._phase, caller and self._name(caller), self._name(frame))
    if key not in self.calls:
      taken = bool(frame.f_code.co_flags & inspect.CO_GENERATOR)
      self.calls[key] = {"looks": 0, "given": {}, "returned": {}, "taken": taken}
    call = self.calls[key]
    call["looks"] += 1
    self._order += 1
    if call["looks"] <= LOOKS:
      for found in self._holdings.of(value):
        call["given" if event == "call" else "returned"].setdefault(found, self._order)

  def _end_phase(self) -> None:
    self._traced, self._phase = None, self._phase + 1
    if self._until is not None:
      batch, count = self._until
      if len(different_phases(self.applies, batch)) == count:
        raise Finished(0)

  def report(self, prompts: list[str]) -> dict:
    """What was seen, as JSON has it; a string as `prompt`, where it holds one of `prompts`."""
    is_prompt = functools.cache(lambda string: any(prompt in string for prompt in prompts))

    def kept(side: dict) -> dict[str, int]:
      kinds = {}
      for (of, found), order in side.items():
        if of == "array" or is_prompt(found):
          kinds.setdefault(found if of == "array" else "prompt", order)
      return kinds

    calls = []
    for (phase, caller, callee), call in self.calls.items():
      given, returned = kept(call["given"]), kept(call["returned"])
      if given or returned:
        who = {"phase": phase, "caller": caller, "callee": callee, "taken": call["taken"]}
        calls.append({**who, "given": given, "returned": returned})
    return {"applies": self.applies, "calls": calls}


def _is_of_jax(frame) -> bool:
  return f"{os.sep}jax{os.sep}" in frame.f_code.co_filename


def different_phases(applies: list[dict], batch: int) -> list[list[int]]:
  """The phases that applied the network to that batch, those with the same stacks together."""
  stacks: dict[int, set] = {}
  for apply in applies:
    if apply["batch"] == batch:
      stacks.setdefault(apply["phase"], set()).add(tuple(map(tuple, apply["frames"])))
  groups: dict[frozenset, list[int]] = {}
  for phase, seen in stacks.items():
    groups.setdefault(frozenset(seen), []).append(phase)
  return list(groups.values())


class Finished(SystemExit):
  """All that was asked for has been seen."""


def captions_below(directory: pathlib.Path) -> list[str]:
  """The captions of every data set there. Raises RuntimeError where there are none."""
  import tensorflow_datasets as tfds

  found = set()
  for features in sorted(directory.rglob("features.json")):
    source = tfds.builder_from_directory(features.parent).as_data_source(split="train")
    found |= {source[i]["caption"].decode() for i in range(len(source))}
  if not found:
    raise RuntimeError(f"no data set with captions below {directory}")
  return sorted(found)


def main(request: str) -> None:
  """request: JSON {module, arguments, sizes, out, prompts or captions: a directory, until?}."""
  asked = json.loads(request)
  spec = importlib.util.find_spec(asked["module"].partition(".")[0])
  sizes = Sizes(**{**asked["sizes"], "latents": tuple(asked["sizes"]["latents"])})
  package = pathlib.Path(spec.submodule_search_locations[0]).resolve()
  recorder = Recorder(package, sizes, asked.get("until"))
  importlib.import_module(asked["module"])  # what it imports is not to be watched, it takes a while
  sys.argv = [asked["module"], *asked["arguments"]]
  recorder.start()
  try:
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
  except SystemExit as end:
    if end.code:
      raise
  recorder.stop()
  prompts = asked.get("prompts") or captions_below(pathlib.Path(asked["captions"]))
  pathlib.Path(asked["out"]).write_text(json.dumps(recorder.report(prompts)))


if __name__ == "__main__":
  main(sys.argv[1])
