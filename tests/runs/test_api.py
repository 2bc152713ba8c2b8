"""The Python API generates the same images as the command, refuses the same input, and imports fast."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import saved_runs
from PIL import Image

import hybridgen
from hybridgen import sample
from hybridgen.core.errors import UserError

PROMPTS = [saved_runs.PROMPT, "a large blue square"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return saved_runs.cascade(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def model(run):
    return hybridgen.load(run)


def test_importing_it_imports_no_jax():
    code = "import hybridgen, sys; assert hybridgen.load and not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_draws_what_the_command_writes(run, model, tmp_path):
    images = model.sample(PROMPTS, count=2, seed=5)
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    sample.main(["--run", str(run), *words, "--count", "2", "--seed", "5", "--out", str(tmp_path)])
    assert len(images) == 4 and images.prompts == (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])
    for number, picture in enumerate(images):
        assert isinstance(picture, Image.Image)
        written = np.asarray(Image.open(tmp_path / f"{number:05d}.png"))
        assert np.array_equal(written, picture) and np.array_equal(written, images[number])
        assert np.array_equal(written, images.array[number])
    assert np.array_equal(images[-1], images.array[3])
    assert images.array.dtype == images.draft.dtype == np.uint8 and images.draft.shape == images.array.shape
    assert images.tokens.shape == (4, 16) and images.sheet(cell=32).mode == "RGB"
    assert np.array_equal(np.asarray(images.sheet(128)), np.asarray(Image.open(tmp_path / "grid.png")))


def test_a_picture_depends_on_its_number_and_its_seed_only(model):
    five = model.sample(saved_runs.PROMPT, count=5, seed=2, batch=4)
    one = model.sample([saved_runs.PROMPT], seed=2, batch=4)
    assert np.abs(five.array[:1].astype(int) - one.array).max() <= 1 and np.array_equal(five.tokens[:1], one.tokens)
    assert not np.array_equal(five.tokens[0], five.tokens[1])
    assert not np.array_equal(model.sample(saved_runs.PROMPT, seed=3, batch=4).tokens, one.tokens)


def test_options_are_those_of_the_command(run, model, tmp_path):
    """None is the run's own; the greedy plan is one, whatever the seed; and a set of options compiles once."""
    greedy = [model.sample(saved_runs.PROMPT, seed=seed, temperature=0.0, steps=3) for seed in (0, 1)]
    assert np.array_equal(greedy[0].tokens, greedy[1].tokens)
    words = ["--run", str(run), "--prompt", saved_runs.PROMPT, "--temperature", "0", "--steps", "3"]
    sample.main([*words, "--out", str(tmp_path)])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "00000.png")), greedy[0][0])
    assert model._drawer.cache_info().hits == 1 and model._drawer.cache_info().misses == 1
    plain = model.sample(saved_runs.PROMPT, guidance=None)
    assert np.array_equal(plain.array, model.sample(saved_runs.PROMPT).array)


def test_what_it_is_and_what_it_refuses(run, model, tmp_path):
    assert model.step == saved_runs.STEP and model.config.family == "hybrid.cascade"
    assert model.config.sample.options.decoder.steps == 2  # options of a call change nothing
    for says, words, options in (
        ("no prompt and no label", [], {}),
        ("no prompt and no label", [[]], {}),
        ("does not know the word 'cirle'; the nearest known word is 'circle'", ["a small red cirle"], {}),
        ("the prompt is empty", [" "], {}),
        ("the prompt must be a string, not int", [[3]], {}),
        ("takes no --label", [PROMPTS], {"labels": [0, 1]}),
        ("2 prompts and 1 labels", [PROMPTS], {"labels": 0}),
        ("unknown option 'guidence'; did you mean 'guidance'?", [PROMPTS], {"guidence": 2.0}),
        ("prior.guidance 'high' is not within", [PROMPTS], {"guidance": "high"}),
        ("options must be numbers or strings", [PROMPTS], {"guidance": [2.0]}),
        ("decoder.solver 'magic' is not one of", [PROMPTS], {"solver": "magic"}),
        ("count 0 is not within 1 and", [PROMPTS], {"count": 0}),
        ("seed -1 is not within 0 and", [PROMPTS], {"seed": -1}),
        ("batch 2.5 is not within 1 and", [PROMPTS], {"batch": 2.5}),
    ):
        with pytest.raises(UserError) as error:
            model.sample(*words, **options)
        assert says in str(error.value)
    with pytest.raises(UserError, match="no run in"):
        hybridgen.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no checkpoint 3"):
        hybridgen.load(run, checkpoint=3)
    with pytest.raises(UserError, match="takes no prompts"):
        hybridgen.load(run.parent / "tokenizer").sample(PROMPTS)
