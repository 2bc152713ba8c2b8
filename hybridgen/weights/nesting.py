"""Where the model's tensors are in a checkpoint: below a root ("ema", "model"), with the prefixes that wrappers add.

torch.compile, FSDP and activation checkpointing put a component of their own into names, at any place; (Distributed)
DataParallel, DeepSpeed and weight averaging put "module." before all names. Both occur together and below a root.
"""

from collections.abc import Iterable, Mapping
from typing import Any

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
MODULE = "module."
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside its "module."
COMMON = ("state_dict", "module")  # roots of any checkpoint: no model has tensors below these names


def model_tensors(tensors: Mapping[str, Any], roots: Iterable[str]) -> Mapping[str, Any]:
    """The tensors under the first of `roots` that occurs, by their names without it and without wrappers.

    All tensors if no root occurs.
    """
    tensors = unwrapped(tensors)
    for root in (*roots, *COMMON):
        if found := below(tensors, root):
            return unwrapped(found)
    return tensors


def empty_roots(tensors: Mapping[str, Any], other: Mapping[str, Any], roots: Iterable[str]) -> list[str]:
    """The roots before the one that is used which the checkpoint has without tensors, such as "ema": None.

    other: the values of the checkpoint that are not tensors, by name.
    """
    found: list[str] = []
    for root in roots:
        if below(tensors, root):
            break
        found += [root] if any(name == root or name.startswith(f"{root}.") for name in other) else []
    return found


def below(tensors: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The tensors whose names begin with `root` and a dot, without this prefix."""
    begin = f"{root}."
    return {name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)}


def unwrapped(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors without what wrappers add to their names; unchanged if two names would become equal."""
    found = {".".join(part for part in name.split(".") if part not in WRAPPERS): x for name, x in tensors.items()}
    if len(found) != len(tensors):
        return tensors
    while len(found.keys() - {COUNTER}) and all(name.startswith(MODULE) for name in found if name != COUNTER):
        found = {name.removeprefix(MODULE): x for name, x in found.items() if name != COUNTER}
    return found if found.keys() != set(tensors) else tensors
