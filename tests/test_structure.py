"""The shape of the code: arrows that point one way, files and functions that fit on a screen, no
torch on the way.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "hiar_jax"

# A module imports only from the lines above its own; within a line, imports make no circle.
LAYERS = [
  "errors types",
  "progress preemption peak_memory",
  "files flow context method",
  "config parallel video attention models packing",
  "checkpoints rollout",
  "data losses",
  "components evaluation",
  "planning training",
  "generation conversion train evaluate compare __main__",
  "streaming generate convert",
  "serving stream plan",
  "serve model",
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
EXPERIMENTS_MAY_IMPORT = {"errors", "types", "flow", "method"}
MAX_FILE, MAX_FUNCTION = 400, 60  # lines; a function's docstring is not counted

SOURCES = sorted(PACKAGE.rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: pathlib.Path) -> set[str]:
  """The absolute names of the modules that a file imports, at its top or inside its functions."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: imports are absolute"
      for alias in node.names:  # `from package import module` imports the module
        name = f"{node.module}.{alias.name}"
        found.add(name if name in MODULES else node.module)
  return found


def part(module: str) -> str:
  """hiar_jax.models.dit -> models."""
  return module.split(".")[1]


def own_imports(path: pathlib.Path) -> set[str]:
  """The modules of this package, its bare name (the version) left out."""
  return {name for name in imports(path) if name.startswith("hiar_jax.")}


def test_every_part_has_its_place():
  parts = {part(name) for name in MODULES if name != "hiar_jax"}
  assert parts <= LAYER.keys(), f"add to LAYERS: {sorted(parts - LAYER.keys())}"


def test_imports_point_one_way():
  wrong = []
  for module, path in MODULES.items():
    if module == "hiar_jax":
      assert not own_imports(path), "hiar_jax/__init__.py imports nothing of the package"
      continue
    for imported in own_imports(path):
      if LAYER[part(imported)] > LAYER[part(module)]:
        wrong.append(f"{module} imports {imported}")
  assert not wrong, "\n".join(sorted(wrong))


def test_imports_make_no_circle():
  graph = {name: own_imports(path) & MODULES.keys() for name, path in MODULES.items()}
  while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
    graph = {name: needs for name, needs in graph.items() if name not in leaves}
  assert not graph, f"in or behind a circle: {sorted(graph)}"


def test_experiments_are_light():
  """A config is read on every host and by every tool: it may not drag models, or JAX itself, behind
  it.
  """
  allowed = {f"hiar_jax.{name}" for name in EXPERIMENTS_MAY_IMPORT}
  for path in EXPERIMENTS:
    found = imports(path)
    others = {name for name in own_imports(path) if not name.startswith("hiar_jax.experiments")}
    assert others <= allowed, f"{path.name} imports {sorted(others - allowed)}"
    assert not {name.split(".")[0] for name in found} & {
      "jax",
      "flax",
      "optax",
      "torch",
      "tensorflow",
    }, path.name


# Where a base, a codec or a text encoder may be named: the others ask the registries.
WAN_ROOMS = ("components", "models", "conversion")


def test_nothing_else_tells_wan_from_shapes():
  for path in SOURCES:
    place = path.relative_to(PACKAGE)
    if place.parts[0] not in WAN_ROOMS:
      nodes = ast.walk(ast.parse(path.read_text()))
      names = {node.id for node in nodes if isinstance(node, ast.Name)}
      knows = {name for name in names if name.startswith(("Wan", "UMT5", "TinyVAE", "PatchPCA"))}
      assert not knows, f"{place} knows {sorted(knows)}"


@pytest.mark.parametrize(
  "path", SOURCES + EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_and_functions_are_short(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= MAX_FILE
  for node in ast.walk(ast.parse("\n".join(lines))):
    if isinstance(node, ast.FunctionDef) and path not in EXPERIMENTS:  # a config is one long list
      first = node.body[0]
      docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
      assert node.end_lineno - node.lineno + 1 - docstring <= MAX_FUNCTION, (
        f"{node.name} is too long"
      )


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_test_files_are_short(path):
  assert len(path.read_text().splitlines()) <= MAX_FILE


def test_rollouts_take_nouns():
  """Three arguments that travel together are a noun: no loop takes more than six by position."""
  for path in SOURCES:
    if path.relative_to(PACKAGE).parts[0] == "rollout":
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
          assert len(node.args.posonlyargs + node.args.args) <= 6, f"{path.name}: {node.name}"


def test_nothing_loads_torch_or_tensorflow():
  """Importing every module, in a fresh process: a person needs neither to train or to generate,
  and SciPy (half a second of every start) only to fit a codebook. The package alone loads no JAX
  before something of it is asked for.
  """
  code = f"""
import importlib, sys
import hiar_jax
assert "jax" not in sys.modules
hiar_jax.load, hiar_jax.stream
for name in {sorted(MODULES)!r}:
  importlib.import_module(name)
  heavy = {{"torch", "tensorflow", "scipy"}} & set(sys.modules)
  assert not heavy, f"{{name}} loads {{heavy}}"
"""
  result = subprocess.run(
    [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr[-2000:]
