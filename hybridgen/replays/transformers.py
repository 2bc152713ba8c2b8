"""Replays of diffusion transformers: DiT as published, and as diffusers has it.

Recorded latents are `[b, c, H, W]`, ours `[b, H, W, c]`. Letters: b pictures, n steps, c channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.core.errors import UserError
from hybridgen.models.diffusion import variance
from hybridgen.nn.timestep import sincos
from hybridgen.replays import Case, rows_first, rows_last
from hybridgen.sampling import guidance, official
from hybridgen.weights.options import Options


class Network:
    """A DiT with its inputs, told timesteps and labels as recorded."""

    def __init__(self, case: Case):
        self.case, (_, part) = case, case.imported
        self.model, self.params = part.model, part.params
        if case.has("in_cfg_scale"):
            case.takes("in_cfg_scale")  # recorded also of a network without a null class, which nothing guides
        self.run = jax.jit(lambda params, x, t, y: self.model.apply({"params": params}, x, t, {"label": y}))

    def __call__(self, x: Any, t: Any, y: Any) -> jax.Array:
        """What it says of `x [b, H, W, c]` at timesteps `t [b]`."""
        return self.run(self.params, jnp.asarray(x), jnp.asarray(t, jnp.float32), jnp.asarray(y))

    @property
    def x(self) -> np.ndarray:
        return rows_last(self.case.takes("in_x"))

    @property
    def labels(self) -> np.ndarray:
        return self.case.takes("in_y")

    @property
    def null(self) -> np.ndarray:
        """The label that stands for none. Raises UserError where the network has none."""
        if not self.model.drop_text:
            raise UserError("config: class_dropout_prob is 0: there is no null class")
        return np.full_like(self.labels, self.model.classes)

    def output(self, y: np.ndarray) -> jax.Array:
        return self(self.x, self.case.takes("in_t"), y)

    def guided(self, channels: int | None) -> jax.Array:
        """The conditional branch, guided in its first channels."""

        def both(x: jax.Array, t: jax.Array) -> jax.Array:
            return self(x, t, guidance.join([self.labels, self.null]))

        call = guidance.guided(both, float(self.case.takes("in_cfg_scale")), channels)
        return call(jnp.asarray(self.x), jnp.asarray(self.case.takes("in_t"), jnp.float32))

    def common(self) -> None:
        """The outputs that both may have."""
        self.case.gives("out_cond", lambda: rows_first(self.output(self.labels)))
        self.case.gives("out_uncond", lambda: rows_first(self.output(self.null)))


def dit(case: Case) -> None:
    """DiTTransformer2DModel: guided in all channels of the prediction, or in three."""
    it = Network(case)
    it.common()
    case.gives("out_cfg_eps", lambda: rows_first(it.guided(it.model.channels)[..., : it.model.channels]))
    case.gives("out_cfg_official", lambda: rows_first(it.guided(3)))


def dit_official(case: Case) -> None:
    """DiT with its process: guidance, kept timesteps, ancestral and DDIM samples, and the terms of the loss."""
    it = Network(case)
    model = it.model
    it.common()

    def both_halves() -> np.ndarray:
        """Guided prediction in both, the other channels each half's own."""
        front, null = it.guided(3), it.output(it.null)
        return rows_first(jnp.concatenate([front, jnp.concatenate([front[..., :3], null[..., 3:]], -1)]))

    case.gives("out_cfg", both_halves)
    case.gives("out_t_freq", lambda: sincos(jnp.asarray(case.takes("in_t"), jnp.float32), 256, scale=1.0))
    process(case, it)

    def probe() -> tuple[Any, Any, Any]:
        """Clean x, timesteps and noise of the training probe."""
        return jnp.asarray(it.x), jnp.asarray(case.takes("in_q_t")), jnp.asarray(rows_last(case.takes("in_q_noise")))

    def noised() -> jax.Array:
        x, k, eps = probe()
        here = variance.at(model, k, x.dtype)
        return here.alpha * x + here.sigma * eps

    def terms() -> tuple[Any, Any, Any]:
        def network(x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
            return it(x, variance.timestep(model, t), it.labels)

        return variance.terms(model, network, *probe(), {})

    case.gives("out_q_sample", lambda: rows_first(noised()))
    case.gives("out_loss_mse", lambda: terms()[0])
    case.gives("out_loss_vb", lambda: terms()[1])


def process(case: Case, it: Network) -> None:
    """Sampling along the timesteps that the config keeps."""
    model, steps = it.model, it.model.timesteps
    text = Options(case.config.get("diffusion", {}), "diffusion").take("timestep_respacing", "") or str(steps)
    text = ",".join(map(str, text)) if isinstance(text, list) else str(text)
    kept = official.respaced(text, steps)
    levels = variance.levels_of(model, kept)

    def way(solver: str, keys: Any) -> np.ndarray:
        trail: list[Any] = []

        def call(x: jax.Array, t: jax.Array) -> jax.Array:
            trail.append(x)
            with jax.disable_jit(False):
                return it(x, variance.timestep(model, t), it.labels)

        with jax.disable_jit():  # step by step, so that the way can be read off
            end = variance.solve(model, call, jnp.asarray(it.x), levels, keys, solver)
        return np.stack([rows_first(x) for x in (*trail, end)])

    noise = [rows_last(one) for one in case.takes("in_step_noise")] if case.has("in_step_noise") else []
    case.gives("out_timesteps_kept", lambda: kept)
    case.gives("out_p_traj", lambda: way("ddpm", lambda i, x: jnp.asarray(noise[int(i)])))
    case.gives("out_ddim_traj", lambda: way("ddim", None))
