"""The Python API generates the same images as the command, refuses the same input, and imports fast."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_runs
from PIL import Image

import hybridgen
from hybridgen import api, sample
from hybridgen.core.errors import UserError
from hybridgen.models.roles import denoiser, next_token
from hybridgen.runs import drawing
from hybridgen.sampling import guidance, tokens

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
    """None is the run's own; and the greedy plan is one, whatever the seed."""
    greedy = [model.sample(saved_runs.PROMPT, seed=seed, temperature=0.0, steps=3) for seed in (0, 1)]
    assert np.array_equal(greedy[0].tokens, greedy[1].tokens)
    words = ["--run", str(run), "--prompt", saved_runs.PROMPT, "--temperature", "0", "--steps", "3"]
    sample.main([*words, "--out", str(tmp_path)])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "00000.png")), greedy[0][0])
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
        ("prior.guidance [2.0] is not within", [PROMPTS], {"guidance": [2.0]}),
        ("prior.guidance True is not within", [PROMPTS], {"guidance": True}),
        ("prior.top_k 2.9 is not a whole number within", [PROMPTS], {"top_k": 2.9}),
        ("decoder.steps 3.5 is not a whole number within", [PROMPTS], {"steps": np.float32(3.5)}),
        ("decoder.guidance.plan 'x' is not within", [PROMPTS], {"decoder_guidance": {"plan": "x"}}),
        ("the prompt must be a string, not int", [3], {}),
        ("the prompt must be a string, not list", [[PROMPTS]], {}),
        ("the prompt must be a string, not NoneType", [[None]], {}),
        ("label 1.7 is not a whole number", [PROMPTS], {"labels": [0, 1.7]}),
        ("label True is not within", [PROMPTS], {"labels": True}),
        ("label None is not within", [PROMPTS], {"labels": [1, None]}),
        ("label '3' is not within", [PROMPTS], {"labels": "3"}),
        ("label [1, 2] is not within", [PROMPTS], {"labels": [[1, 2]]}),
        ("--size 3 is not HEIGHTxWIDTH", [PROMPTS], {"size": 3}),
        ("decoder.solver 'magic' is not one of", [PROMPTS], {"solver": "magic"}),
        ("count 0 is not within 1 and", [PROMPTS], {"count": 0}),
        ("seed -1 is not within 0 and", [PROMPTS], {"seed": -1}),
        ("batch 2.5 is not a whole number within 1 and", [PROMPTS], {"batch": 2.5}),
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


@pytest.mark.parametrize(
    "labels",
    [
        3,
        np.int64(3),
        np.array(3),
        jnp.asarray(3),
        [3],
        (np.uint8(3),),
        np.array([3]),
        jnp.asarray([3]),
        [3.0],
        range(3, 4),
    ],
    ids=repr,
)
def test_labels_in_every_form(labels):
    assert api._requests(None, labels) == [(None, 3)]
    assert api._requests(np.array(["a"]), labels) == [("a", 3)]


def test_a_label_out_of_range_is_the_one_that_is_named():
    loaded = SimpleNamespace(config=SimpleNamespace(family="x", data={}), draws=True, generates=True, plans=False)
    loaded = SimpleNamespace(**vars(loaded), reads=False, classes=2, tokenizer=None)
    for labels, wrong in (([1, 99], 99), ([0, -1, 99], -1), ([1, 2], 2)):
        with pytest.raises(UserError, match=f"--label 0 to 1, not {wrong}$"):
            sample.conditions(loaded, api._requests(None, labels))


@pytest.fixture
def lowered():
    """The names of the events of lowering a program, so far."""
    seen = []
    listener = lambda name, *_, **__: seen.append(name) if name.endswith("jaxpr_to_mlir_module_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listener)


def test_another_number_compiles_nothing(model, lowered):
    """Guidance, temperature and the counts of filters are arguments of one program; being off is another program."""
    base = {"guidance": 2.0, "temperature": 0.9, "top_k": 3, "top_p": 0.9, "decoder_guidance": 1.5}
    first = model.sample(PROMPTS[0], **base)
    assert lowered
    lowered.clear()
    changes = [{"guidance": np.float32(3)}, {"temperature": 2}, {"top_k": np.int64(5)}, {"top_p": 0.5}]
    changes += [{"decoder_guidance": 4.0}, {"decoder_guidance": np.array(2.5)}]
    drawn = [model.sample(PROMPTS[0], **base | change) for change in changes]
    assert not lowered
    assert all(not np.array_equal(one.array, first.array) for one in drawn[-2:])
    assert np.array_equal(model.sample(PROMPTS[0], **base).array, first.array) and not lowered
    model.sample(PROMPTS[0], **base | {"guidance": 1.0})
    assert lowered


def test_what_is_traced():
    """Numbers that are not off, one by one where there is one per condition; the rest is constant."""
    known = {"prior": next_token.OPTIONS, "decoder": denoiser.OPTIONS}
    options = {"prior": {"guidance": 1.0, "temperature": 0.0, "top_k": 4, "guidance_until": 0.5}}
    options |= {"decoder": {"guidance": {"plan": 1.5, "text": 1.0}, "steps": 2, "solver": "ddim"}}
    found = drawing.traced(drawing.checked(options, known), known)
    assert found == {"prior": {"top_k": 4}, "decoder": {"guidance": {"plan": 1.5}}}
    assert found["prior"]["top_k"].dtype == np.int32 and found["decoder"]["guidance"]["plan"].dtype == np.float32
    assert drawing.replaced(options, {"decoder": {"guidance": {"plan": 2}}})["decoder"] == {
        "guidance": {"plan": 2, "text": 1.0},
        "steps": 2,
        "solver": "ddim",
    }


def test_a_shared_program_draws_what_constants_draw():
    """Tokens and logits by numbers that are arguments equal those by numbers that are constants."""
    logits = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)

    def draw(options):
        scale = options.pop("guidance")
        return tokens.draw(keys, guidance.combine(logits[::2], logits[1::2], scale), **options)

    options = {"guidance": 2.5, "temperature": 0.7, "top_k": 3, "top_p": 0.8}
    with_constants = jax.jit(lambda: draw(dict(options)))()
    shared = jax.jit(lambda given: draw(dict(given)))(drawing.traced(options, next_token.OPTIONS))
    assert np.array_equal(with_constants[0], shared[0])
    np.testing.assert_allclose(with_constants[1], shared[1], rtol=1e-5)
