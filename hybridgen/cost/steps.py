"""What a training step does: its loss as a program to count, its FLOPs, and the FLOP/s that its devices could give."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from hybridgen.core import trees
from hybridgen.cost import chips, flops
from hybridgen.models import contract
from hybridgen.models.contract import Shape
from hybridgen.training.rates import Work


def objective(rule: Any, state: dict, batch: dict, parts: Any) -> tuple[Callable, tuple]:
    """(the loss as a function of the trainable parameters and other arguments, these arguments).

    rule: of hybridgen.train; state, batch, parts: the arguments of a training step, which may be abstract.
    """
    trainable, frozen = rule.which.split(state["params"])
    model, parts = rule.fitted(batch, parts)

    def loss(trainable: Any, frozen: Any, batch: dict, parts: Any, extra: Any, step: Any) -> Any:
        options = {"parts": parts, "extra": extra, "step": step, "train": True}
        return rule.family.loss(model, trees.join(trainable, frozen), batch, jax.random.key(0), **options)[0]

    return loss, (trainable, frozen, batch, parts, state["extra"], state["step"])


def counted(
    rule: Any, state: dict, batch: dict, experiment: Any, shapes: Iterable[Shape] | None, count: bool
) -> dict[Shape | None, Work]:
    """{shape of the images, or None if there is only one: what a step does}, with FLOPs if `count`: it takes a trace.

    batch: abstract, global; shapes: all that occur, if batches differ. Tokens are those of a prior's images.
    """
    out: dict[Shape | None, Work] = {}
    for shape in [None] if shapes is None else shapes:
        given, image = dict(batch), batch.get("image")
        if shape is not None:
            given["image"] = jax.ShapeDtypeStruct((image.shape[0], *shape, 3), image.dtype)
        rows, total = next(iter(given.values())).shape[0], 0.0
        length = _tokens(rule.family, rule.fitted(given, experiment.parts)[0])
        if count:
            loss, arguments = objective(rule, state, given, experiment.parts)
            # a kernel may have unknown FLOPs
            with jax.set_mesh(experiment.mesh), contextlib.suppress(NotImplementedError):
                total = float(sum(flops.training(loss, *arguments)[0].values()))
        out[shape] = Work(1, rows, rows * length, total)
    return out


def _tokens(family: Any, model: Any) -> int:
    """Tokens per image of a prior, or of the prior that is trained inside a model; 0: there is none."""
    inner = contract.members(family, model).get("prior")
    if "prior" in contract.roles(family):
        return model.length
    return inner.model.length if inner else 0


def options_named(model: Mapping, name: str, path: str = "model") -> dict[str, Any]:
    """{dotted path: value} of an option of a model and of the members of a cascade."""
    found = {f"{path}.{name}": model[name]} if name in model else {}
    for key, value in model.items():
        if hasattr(value, "items"):
            found |= options_named(value, name, f"{path}.{key}")
    return found


def dtype_of(model: Mapping) -> str:
    """The compute dtype of a model, from its options."""
    return next(iter(options_named(model, "dtype").values()), "float32")


def peak(model: Mapping, devices: Any) -> float:
    """FLOP/s of an array of devices in the model's compute dtype; 0.0 if their kind is not known (cost/chips.py)."""
    chip = chips.find(devices.flat[0].device_kind)
    return chip.peak(dtype_of(model)) * devices.size if chip else 0.0
