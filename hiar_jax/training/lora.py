"""Low-rank adaptation (LoRA, arXiv 2106.09685): small matrices are trained beside frozen ones.

    W = W0 + (alpha / rank) A B     W0 [in out] frozen, A [in rank] random, B [rank out] zeros

The trained tree holds {"adapters": {... path of W0 ...: {a, b}}} and, as they are, the modules that
are new. Merged with the frozen tree it is the network's own again, with which everything else
works: networks, samplers and checkpoints know nothing of adapters. So a step merges first, and the
gradient passes the sum on to A and B alone:

    loss = lambda trained, part: ... bind(network, adapters.merged(trained, frozen), text) ...
"""

from collections.abc import Iterator
import dataclasses

from flax import traverse_util
import jax
import jax.numpy as jnp

from hiar_jax.errors import UserError, at_least
from hiar_jax.models.frames import Network, abstract_weights
from hiar_jax.parallel.rules import Rules
from hiar_jax.types import Key, Params

ADAPTERS = "adapters"


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """The adapters of a network.

  rank: 0 = none, all weights are trained. alpha: the sum A B counts alpha / rank times; 0: once.
  modules: parts of a layer, by the names in their parameters' paths, as "self_attention" or "q",
  whose matrices get adapters; () = all matrices of the layers, as musubi-tuner has it (rank 32;
  Helios: 128).
  """

  rank: int = 0
  alpha: float = 0.0
  modules: tuple[str, ...] = ()

  def __post_init__(self):
    at_least(0, rank=self.rank, alpha=self.alpha)

  @property
  def scale(self) -> float:
    return self.alpha / self.rank if self.alpha else 1.0


@dataclasses.dataclass(frozen=True)
class Adapters:
  """The adapters of a network's layers. whole: top modules that are trained as they are."""

  network: Network
  config: LoRAConfig
  whole: tuple[str, ...] = ()

  def start(self, key: Key, params: Params) -> Params:
    """Returns the trained tree before the first update, of the network's parameters.

    A is drawn evenly from +- 1 / sqrt(in), as published code does (PyTorch's default of a linear
    layer). params: arrays or shapes. Raises UserError where `modules` names nothing that has a
    matrix.
    """
    self._check_names(params)
    found = {}
    for i, (path, kernel) in enumerate(self._matrices(params)):
      (*stack, rows, columns), rank = kernel.shape, self.config.rank
      a = jax.random.uniform(jax.random.fold_in(key, i), (*stack, rows, rank), minval=-1)
      found[ADAPTERS, *path, "a"] = a * rows**-0.5
      found[ADAPTERS, *path, "b"] = jnp.zeros((*stack, rank, columns))
    return traverse_util.unflatten_dict(found) | {name: params[name] for name in self.whole}

  def frozen(self, params: Params) -> Params:
    """Returns the parameters that nobody trains."""
    return {name: part for name, part in params.items() if name not in self.whole}

  def merged(self, trained: Params, frozen: Params) -> Params:
    """Returns the network's parameters."""
    flat, added = (traverse_util.flatten_dict(tree) for tree in (frozen, trained[ADAPTERS]))
    for *path, name in added:
      if name == "a":
        a, b = added[*path, "a"], added[*path, "b"]
        kernel = flat[tuple(path)]
        # float32, as the pair is, whatever the frozen matrix is: so is the sum's gradient
        flat[tuple(path)] = kernel + self.config.scale * (a @ b)
    return traverse_util.unflatten_dict(flat) | {name: trained[name] for name in self.whole}

  # what the loop and the optimizer ask of a network, for the trained tree

  @property
  def sharding_rules(self) -> Rules:
    """The network's, and A split as the inputs, B as the outputs of their matrix."""
    rules = []
    for pattern, axes in self.network.sharding_rules:
      *stack, rows, columns = (*axes, *(None,) * (3 - len(axes)))
      if pattern.endswith("kernel"):
        rules += [(f"{pattern}/a", (*stack, rows)), (f"{pattern}/b", (*stack, None, columns))]
      rules.append((pattern, axes))
    return tuple(rules)

  def matrix_axes(self, path: tuple[str, ...], ndim: int) -> tuple[int, int] | None:
    return self.network.matrix_axes(path[1:-1] if path[0] == ADAPTERS else path, ndim)

  def _matrices(self, params: Params) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
    """Yields the matrices [... in out] that have adapters: those that Muon would move."""
    modules = self.config.modules
    for path, leaf in sorted(traverse_util.flatten_dict(params).items()):
      if self.network.matrix_axes(path, leaf.ndim) == (leaf.ndim - 2, leaf.ndim - 1):
        if not modules or set(modules) & set(path):
          yield path, leaf

  def check(self) -> None:
    """Raises UserError, before any weights are there, for `modules` that name nothing, and for a
    rank that is more than a matrix has.
    """
    params, rank = abstract_weights(self.network), self.config.rank
    self._check_names(params)
    rows, columns = min((x.shape[-2:] for _, x in self._matrices(params)), key=min)
    if rank > min(rows, columns):
      raise UserError(
        f"lora.rank = {rank}: expected at most {min(rows, columns)}, as the smallest matrix is "
        f"{rows} x {columns}; 0 trains all weights"
      )

  def _check_names(self, params: Params) -> None:
    every = dataclasses.replace(self, config=dataclasses.replace(self.config, modules=()))
    names = {name for path, _ in every._matrices(params) for name in path[1:-1]}
    for name in set(self.config.modules) - names:
      raise UserError(f"lora.modules: {name!r}: the layers have {', '.join(sorted(names))}")
