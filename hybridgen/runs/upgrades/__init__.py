"""Configs of runs that an earlier version wrote, as this one reads them.

A file here is a family as it was, by its dotted name with underscores: `upgrade(model) -> (family, model)`, from its
old options to the family and options of today, or None where they are those of today. It raises UserError, with the
command that imports the weights anew, for what cannot be mapped. Arrays are as they were.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError


def upgraded(config: ConfigDict) -> ConfigDict:
    """The config of a run, its family and options, and those of members within it, as they are called today."""
    family, model = config.get("family"), config.get("model")
    if not isinstance(family, str) or not hasattr(model, "items"):
        return config  # refused where it is read
    plain = config_lib.plain(config)
    new = renewed(plain["family"], plain["model"])
    if new == (plain["family"], plain["model"]):
        return config
    plain["family"], plain["model"] = new
    return config_lib.from_plain(plain)


def renewed(family: str, model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(family, options) of a model, plain data, as they are called today."""
    name = f"{__name__}.{family.replace('.', '_')}"
    known = family.replace(".", "_").isidentifier() and importlib.util.find_spec(name) is not None
    try:
        found = importlib.import_module(name).upgrade(dict(model)) if known else None
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # the config may be anybody's
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"the config does not describe a model of {family}: {text}") from error
    return found or (family, dict(model))
