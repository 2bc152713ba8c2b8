"""Run folders with random arrays, in training's layout: a tokenizer, a prior, a decoder and their cascade."""

from pathlib import Path

import tiny
from tiny import ROOT  # noqa: F401  so that configs can be imported

from configs import common
from hybridgen.data import sources
from hybridgen.runs import checkpoint, experiment
from hybridgen.runs import folder as run_folder
from hybridgen.training import resume, state

DATA = common.shapes(resolution=tiny.SIDE, length=8, shapes=("circle", "square"), templates=1)
PROMPT = "a small red circle"
STEP = 7


def save(folder: Path, family: str, model: dict, parts: dict, seed: int, options: dict | None = None) -> Path:
    """A run at STEP; a digest of each part goes into its checkpoint."""
    config = common.stage(family, model, DATA, steps=10, batch=2, **{"ema__decay": 0.9})
    config.parts.update(parts)
    config.sample.options = type(config)(options or {}, convert_dict=True)
    source = sources.build(config.data, "train")
    built = experiment.build(config, folder, source)
    specs = state.spec_of(tiny.batch(1))
    now, average = (tiny.filled(built.family, built.model, specs, built.parts, number) for number in (seed, seed + 90))
    arrays = {"params": now.get("params", {}), "ema": average.get("params", {}), "extra": now["extra"]}
    run_folder.make(folder)
    resolved, fingerprint = resume.described(config, built, source)
    with checkpoint.Checkpointer(folder / "checkpoints", fingerprint=fingerprint) as saved:
        saved.save(STEP, arrays, meta={"parts": built.digests})
    run_folder.write_json(folder / "config.json", resolved)
    if built.text:
        run_folder.write_json(folder / "text.json", built.text.to_json())
    return folder


def cascade(folder: Path) -> Path:
    """`folder`/tokenizer, prior, decoder and the cascade of them, whose folder is returned."""
    draw = {"prior": {"guidance": 1.0, "temperature": 1.0}, "decoder": {"steps": 2, "solver": "euler", "guidance": 1.0}}
    save(folder / "tokenizer", "tokenizers.vq", tiny.FSQ, {}, 1)
    tokenizer = {"tokenizer": "../tokenizer"}
    prior = tiny.PRIOR | {name: "auto" for name in ("vocab", "grid", "text_vocab", "text_length")}
    save(folder / "prior", "ar.raster", prior, tokenizer, 2, {"prior": draw["prior"]})
    save(folder / "decoder", "diffusion.dit", tiny.DECODER | {"plan_width": "auto"}, tokenizer, 3)
    parts = tokenizer | {"prior": "../prior", "decoder": "../decoder"}
    return save(folder / "cascade", "hybrid.cascade", {"mode": "tokens"}, parts, 4, draw)
