"""hybridgen: image generators that combine autoregressive and diffusion models, in JAX.

To generate images from a trained run or from a bundle of `hybridgen export`:

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
    """Loads the model of a run folder or bundle for sampling: a `hybridgen.api.Model`.

    `path`: a folder that training, `hybridgen convert` or `hybridgen export` wrote. `checkpoint`: a training step
    (default: the newest valid one). Raises `hybridgen.core.errors.UserError`, a ValueError with a message of one line.
    `import hybridgen` alone does not import JAX.
    """
    from hybridgen import api  # imported here, so that `import hybridgen` is fast and starts no backend

    return api.load(path, checkpoint)
