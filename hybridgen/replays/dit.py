"""Replay of DiT of diffusers: class `DiTTransformer2DModel`, guided in all channels of the prediction, or in three."""

from hybridgen.replays import Case, rows_first
from hybridgen.replays._dit import Network


def replay(case: Case) -> None:
    """Compares the outputs for a label, for the null class, and with guidance."""
    it = Network(case)
    it.common()
    case.gives("out_cfg_eps", lambda: rows_first(it.guided(it.model.channels)[..., : it.model.channels]))
    case.gives("out_cfg_official", lambda: rows_first(it.guided(3)))
