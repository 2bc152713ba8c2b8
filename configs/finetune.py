"""The entries of fine-tuning, `hybridgen train --from RUN`: they are the same whatever the model.

The model, its text tokenizer and parts are those of RUN, and so are batch size, optimizer, EMA and sampling options if
it was trained by hybridgen; `optim.lr` is then a tenth of RUN's. The entries below are those of imported weights, and
the length of the run, its warm-up and its reports for all.
"""

from configs import common


def get_config(variant: str = ""):
    if variant:
        raise common.unknown(variant)
    config = common.stage("", {}, {}, steps=500, batch=16, optim__lr=1e-4)
    config.data.update(source="folder", options={}, resolution=32, flip=False, workers=0, threads=1, retry=120.0)
    config.checkpoint.every = 250
    config.log.every = 25
    config.eval.every = 100
    return config
