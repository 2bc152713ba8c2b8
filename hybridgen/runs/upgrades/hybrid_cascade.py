"""Old options of `hybrid.cascade`: jointly trained members as JSON strings, and the image shape as an option."""

import json
from typing import Any

from hybridgen.runs import upgrades


def upgrade(model: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """See upgrades/__init__.py."""
    new = {name: value for name, value in model.items() if name != "shape"}
    for name in ("prior", "decoder"):
        member = model.get(name)
        member = json.loads(member) if isinstance(member, str) and member else member
        if member:
            family, options = upgrades.renewed(member["family"], member["model"])
            new[name] = {"family": family, "model": options}
    return None if new == model else ("hybrid.cascade", new)
