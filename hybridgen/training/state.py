"""The training state and its creation: sharded from the start, without optimizer state for frozen parameters.

The state is `{"step", "params", "opt", "ema", "extra", "health"}`, nested dicts of arrays. `step` counts the batches so
far; the optimizer counts its own updates. `opt` and `ema` cover trainable parameters only. `health` has the number of
`skipped` steps so far, the `streak` of consecutive bad steps, and `norm`, the moving average of the log gradient norm
over `count` good steps.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hybridgen.core import placement, rng, sharding, trees
from hybridgen.core.errors import UserError
from hybridgen.models import contract
from hybridgen.training import optim


class Trainable(NamedTuple):
    """Which parameters are trained and which have an EMA: ordered (pattern, bool) rules over paths."""

    rules: tuple[tuple[str, bool], ...]
    no_ema: str  # pattern of parameters without an EMA (discriminators)
    decay: float  # of the EMA; 0: no EMA

    def check(self, params: Any) -> None:
        """Raises UserError for a pattern that is no regular expression, or that matches no parameter."""
        paths = trees.flatten(params)
        for pattern, _ in self.rules:
            try:
                if any(re.search(pattern, path) for path in paths):
                    continue
            except re.error as error:
                raise UserError(f"trainable: {pattern!r} is not a regular expression: {error}") from None
            some = ", ".join(list(paths)[:3])
            raise UserError(f"trainable: {pattern!r} matches no parameter; parameters are {some}, ...")

    def split(self, params: Any) -> tuple[dict, dict]:
        """(trainable, frozen), nested."""
        return trees.split(params, lambda path: bool(trees.first_match(path, self.rules, True)))

    def averaged(self, trainable: Any) -> dict:
        """The trainable parameters that have an EMA."""
        if not self.decay:
            return {}
        kept, _ = trees.split(trainable, lambda path: not (self.no_ema and re.search(self.no_ema, path)))
        return kept


def trainable_of(config: Any) -> Trainable:
    """A config's rules for trained parameters and the EMA."""
    return Trainable(
        tuple((str(pattern), bool(value)) for pattern, value in config.trainable),
        config.ema.skip,
        float(config.ema.decay),
    )


def initial(arrays: dict, rule: optax.GradientTransformation, which: Trainable, frozen_dtype: str) -> dict:
    """The state at step 0, from the arrays {"params", "extra"} of a family's `init`."""
    trainable, frozen = which.split(arrays["params"])
    frozen = jax.tree.map(lambda x: x.astype(frozen_dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, frozen)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": trees.join(trainable, frozen),
        "opt": optim.pack(rule.init(trainable)),
        "ema": jax.tree.map(jnp.copy, which.averaged(trainable)),
        "extra": arrays["extra"],
        "health": {
            "skipped": jnp.zeros((), jnp.int32),
            "streak": jnp.zeros((), jnp.int32),
            "norm": jnp.zeros(()),
            "count": jnp.zeros((), jnp.int32),
        },
    }


def shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a state: parameters, EMA and optimizer state by PARAM_RULES, everything else replicated."""
    everywhere = placement.replicated(mesh)
    rest = {name: jax.tree.map(lambda _: everywhere, state[name]) for name in ("step", "extra", "health")}
    return rest | {
        "params": sharding.param_shardings(state["params"], mesh),
        "ema": sharding.param_shardings(state["ema"], mesh),
        "opt": sharding.mirror_shardings(state["opt"], state["params"], mesh),
    }


def create(experiment: Any, seed: int, specs: dict, rule_of: Any) -> tuple[dict, Any]:
    """(abstract state with shardings, function that creates the state on the mesh).

    `rule_of(trainable)` builds the optimizer, which depends on the paths of the parameters.
    """
    family, model, parts, mesh = experiment.family, experiment.model, experiment.parts, experiment.mesh
    which = trainable_of(experiment.config)

    def fresh(parts: Any) -> dict:
        key = rng.step_key(jax.random.key(seed), 0, "init")
        arrays = contract.returned(family, "init", family.init(model, key, specs, parts))
        which.check(arrays["params"])
        trainable, _ = which.split(arrays["params"])
        return initial(arrays, rule_of(trainable), which, experiment.config.frozen_dtype)

    shapes = jax.eval_shape(fresh, parts)
    places = shardings(shapes, mesh)
    abstract = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
    return abstract, lambda parts=parts: jax.jit(fresh, out_shardings=places)(parts)


def check_start(state: dict, sources: dict[str, Any], extra: Any = None) -> None:
    """Raises UserError if arrays of other runs do not fit a state, which may be abstract; names all that differ."""
    for prefix, arrays in sources.items():
        _check(state["params"], prefix, arrays)
    if extra is not None:
        _check(state["extra"], "", extra)


def start_from(state: dict, sources: dict[str, Any], which: Trainable, extra: Any = None) -> dict:
    """Replaces subtrees of new parameters by those of other runs: {"path/of/subtree" or "": arrays}; and `extra`.

    The EMA starts with the same values; the optimizer state stays new. Raises UserError if trees or shapes differ.
    """
    check_start(state, sources, extra)
    params = state["params"]
    for prefix, arrays in sources.items():
        params = _replaced(params, prefix, arrays)
    trainable, _ = which.split(params)
    state = state | {"params": params, "ema": jax.tree.map(jnp.copy, which.averaged(trainable))}
    return state if extra is None else state | {"extra": _replaced(state["extra"], "", extra)}


def _given(prefix: str, arrays: Any) -> dict[str, Any]:
    """The arrays for the subtree `prefix` by their whole path."""
    return {f"{prefix}/{path}" if prefix else path: leaf for path, leaf in trees.flatten(arrays).items()}


def _check(tree: Any, prefix: str, arrays: Any) -> None:
    """Raises UserError if `arrays` do not fit the subtree `prefix` ("": all) of `tree`."""
    flat, given = trees.flatten(tree), _given(prefix, arrays)
    here = {path for path in flat if not prefix or path.startswith(f"{prefix}/")}
    if not prefix and not any(path.startswith("disc/") for path in given):
        here = {path for path in here if not path.startswith("disc/")}  # imported weights have no discriminator
    if odd := sorted(here ^ set(given)):
        where = "the run to initialize from" if odd[0] in given else "this model"
        raise UserError(f"init_from[{prefix!r}]: {len(odd)} arrays do not match; {odd[0]!r} is in {where} only")
    if wrong := [path for path, leaf in given.items() if leaf.shape != flat[path].shape]:
        listed = "; ".join(
            f"{path!r} has shape {given[path].shape}, but this model has {flat[path].shape}" for path in wrong[:8]
        )
        raise UserError(f"init_from: {listed}" + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""))


def _replaced(tree: Any, prefix: str, arrays: Any) -> dict:
    """`tree` with its subtree `prefix` ("": all) taken from `arrays`, with the tree's dtypes and shardings."""
    flat = trees.flatten(tree)
    for path, leaf in _given(prefix, arrays).items():
        flat[path] = placement.put(jnp.asarray(leaf, flat[path].dtype), flat[path].sharding)
    return trees.unflatten(flat)


def spec_of(batch: dict) -> dict:
    """ShapeDtypeStructs of a batch."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
