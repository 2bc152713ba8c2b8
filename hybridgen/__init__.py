"""hybridgen: image generators that join autoregressive planning with diffusion rendering, in JAX.

From a trained run, or a bundle that `hybridgen export` made of one, to pictures:

    import hybridgen
    model = hybridgen.load("runs/shapes/cascade")
    images = model.sample(["a small red circle", "two blue squares"], seed=0)
    images[0].save("circle.png")
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridgen.api import Model

__version__ = "0.1.0"


def load(path: str | os.PathLike, *, checkpoint: int | None = None) -> "Model":
    """The model of a run folder or of a bundle, ready to draw: a `hybridgen.api.Model`.

    `path`: what training, `hybridgen convert` or `hybridgen export` wrote. `checkpoint`: a step (default: the newest
    good one). Raises `hybridgen.core.errors.UserError`, a ValueError, in one line. Importing hybridgen imports no JAX.
    """
    from hybridgen import api  # here, so that the import above stays quick and starts no backend

    return api.load(path, checkpoint)
