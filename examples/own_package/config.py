"""The prior and the data source of my_package: see docs/adding_a_family.md.

    hybridgen train --config examples/own_package/config.py:tokenizer --workdir runs/own/tokenizer
    hybridgen train --config examples/own_package/config.py --workdir runs/own/prior
    hybridgen sample --run runs/own/prior --label 1 --flatness 0.1 --out samples

All commands need PYTHONPATH=examples/own_package.
"""

from configs import common
from configs.tokenizers import vq


def get_config(variant=""):
    data = common.shapes() | {"source": "my_package.my_source.Stripes", "options": {"width": 4}}
    if variant == "tokenizer":
        config = vq.get_config("tiny")
        config.data.update(data)
        return config
    model = {"vocab": "auto", "grid": "auto", "classes": "auto"}
    config = common.stage("my_package.my_prior", model, data, steps=60, batch=16, optim__lr=3e-3)
    config.parts.tokenizer = "../tokenizer"
    config.sample.options = {"prior": {"guidance": 1.5, "temperature": 1.0, "flatness": 0.0}}
    config.log.every = 10
    return config
