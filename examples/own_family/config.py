"""The prior of my_package on the built-in shapes, whose label is the number of the shape."""

from configs import common


def get_config(variant=""):
    model = {"vocab": "auto", "grid": "auto", "classes": 10}
    config = common.stage("my_package.my_prior", model, common.shapes(), steps=60, batch=16, optim__lr=3e-3)
    config.parts.tokenizer = "../tokenizer"
    config.sample.options = {"prior": {"guidance": 1.5, "temperature": 1.0, "flatness": 0.05}}
    config.log.every = 10
    return config
