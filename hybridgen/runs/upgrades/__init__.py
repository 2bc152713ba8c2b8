"""Converts the configs of runs that an earlier version wrote.

There is one file per family that has changed, named by its dotted name with underscores. Its `upgrade(model) ->
(family, model)` converts old options to the current family and options; it returns None if they are current already.
It raises UserError, with the command that imports the weights again, for options that have no equivalent. Arrays do not
change.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError


def upgraded(config: ConfigDict) -> ConfigDict:
    """The config of a run with current families and options, also of the members of its model."""
    family, model = config.get("family"), config.get("model")
    if not isinstance(family, str) or not hasattr(model, "items"):
        return config  # invalid: the caller raises
    plain = config_lib.plain(config)
    new = renewed(plain["family"], plain["model"])
    if new == (plain["family"], plain["model"]):
        return config
    plain["family"], plain["model"] = new
    return config_lib.from_plain(plain)


def renewed(family: str, model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(family, options) of a model, plain data, converted to the current ones. Raises UserError if that fails."""
    name = f"{__name__}.{family.replace('.', '_')}"
    known = family.replace(".", "_").isidentifier() and importlib.util.find_spec(name) is not None
    try:
        found = importlib.import_module(name).upgrade(dict(model)) if known else None
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # the config may be untrusted
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"the config does not describe a model of {family}: {text}") from error
    return found or (family, dict(model))
