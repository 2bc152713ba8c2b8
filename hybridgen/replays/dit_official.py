"""Replay of DiT as published: class `DiT` of facebookresearch, with the process of `create_diffusion`.

Letters: b pictures, n steps, c channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridgen.models.diffusion import variance
from hybridgen.nn.timestep import sincos
from hybridgen.replays import Case, rows_first, rows_last
from hybridgen.replays._dit import Network
from hybridgen.sampling import official
from hybridgen.weights.options import Options


def replay(case: Case) -> None:
    """Compares guidance, kept timesteps, ancestral and DDIM samples, and the terms of the loss."""
    it = Network(case)
    process = it.model.process
    it.common()

    def both_halves() -> np.ndarray:
        """The guided channels are the same in both halves, the other channels differ."""
        front, null = it.guided(3), it.output(it.null)
        return rows_first(jnp.concatenate([front, jnp.concatenate([front[..., :3], null[..., 3:]], -1)]))

    case.gives("out_cfg", both_halves)
    case.gives("out_t_freq", lambda: sincos(jnp.asarray(case.takes("in_t"), jnp.float32), 256, scale=1.0))
    trajectories(case, it)

    def probe() -> tuple[Any, Any, Any]:
        """Clean x, timesteps and noise of the recorded training step."""
        return jnp.asarray(it.x), jnp.asarray(case.takes("in_q_t")), jnp.asarray(rows_last(case.takes("in_q_noise")))

    def noised() -> jax.Array:
        x, k, eps = probe()
        here = variance.at(process, k, x.dtype)
        return here.alpha * x + here.sigma * eps

    def terms() -> tuple[Any, Any, Any]:
        def network(x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
            return it(x, variance.timestep(process, t), it.labels)

        return variance.terms(process, network, *probe(), {})

    case.gives("out_q_sample", lambda: rows_first(noised()))
    case.gives("out_loss_mse", lambda: terms()[0])
    case.gives("out_loss_vb", lambda: terms()[1])


def trajectories(case: Case, it: Network) -> None:
    """Compares samples along the timesteps that the config keeps."""
    process, steps = it.model.process, it.model.process.timesteps
    text = Options(case.config.get("diffusion", {}), "diffusion").take("timestep_respacing", "") or str(steps)
    text = ",".join(map(str, text)) if isinstance(text, list) else str(text)
    kept = official.respaced(text, steps)
    levels = variance.levels_of(process, kept)

    def trajectory(solver: str, keys: Any) -> np.ndarray:
        trail: list[Any] = []

        def call(x: jax.Array, t: jax.Array) -> jax.Array:
            trail.append(x)
            with jax.disable_jit(False):
                return it(x, variance.timestep(process, t), it.labels)

        with jax.disable_jit():  # step by step, so that the trajectory can be recorded
            end = variance.solve(process, call, jnp.asarray(it.x), levels, keys, solver)
        return np.stack([rows_first(x) for x in (*trail, end)])

    noise = [rows_last(one) for one in case.takes("in_step_noise")] if case.has("in_step_noise") else []
    case.gives("out_timesteps_kept", lambda: kept)
    case.gives("out_p_traj", lambda: trajectory("ddpm", lambda i, x: jnp.asarray(noise[int(i)])))
    case.gives("out_ddim_traj", lambda: trajectory("ddim", None))
