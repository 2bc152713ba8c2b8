"""Timestep grids of the official schedulers: known numbers, and finite for all options of the official classes."""

import json
from pathlib import Path

import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.replays import Case, find, names
from hybridgen.sampling import official

GOLDEN = Path(__file__).parents[1] / "golden"
BAR = official.alphas_bar(official.betas("scaled_linear", 1000, 0.00085, 0.012))


def test_timesteps_of_ten_steps():
    """Three spacings, three trajectories."""
    ends = {name: official.spaced(name, 10, 1000, 1)[[0, -1]].tolist() for name in ("leading", "trailing", "linspace")}
    assert ends == {"leading": [901, 1], "trailing": [999, 99], "linspace": [999, 0]}
    for spacing in ends:
        assert (np.diff(official.spaced(spacing, 7, 1000)) < 0).all()
        assert len(official.spaced_by_solver(spacing, 7, 1000, 1000)) == 7
    with pytest.raises(UserError, match="'even' is not one of linspace"):
        official.spaced("even", 3, 1000)
    with pytest.raises(UserError, match="steps 1001 is not within 1 and 1000 timesteps"):
        official.spaced("linspace", 1001, 1000)


def test_levels():
    sigmas = official.sigmas_of(BAR)
    np.testing.assert_allclose(sigmas[-1], 14.6146, rtol=1e-5)  # Stable Diffusion's largest
    np.testing.assert_allclose(official.timestep_of(sigmas[[0, 500, 999]], np.log(sigmas)), [0, 500, 999], atol=1e-3)
    for name, grid in official.REGRIDDED.items():
        drawn = grid(14.6, 0.03, 8)
        np.testing.assert_allclose(drawn[[0, -1]], [14.6, 0.03], rtol=1e-6, err_msg=name)
        assert (np.diff(drawn) < 0).all()
    assert official.clipped(BAR, -np.inf) == 1000 and 0 < official.clipped(BAR, -1.0) < 1000
    level = official.from_ratio(np.arange(3), np.array([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1)
    np.testing.assert_allclose(level.sigma / level.alpha, [0, 1, 3])


def test_stretched_to_zero_signal():
    bar = official.alphas_bar(official.betas("scaled_linear", 1000, 0.00085, 0.012), zero_snr=True)
    assert bar[-1] == 0 and (np.diff(bar) <= 0).all()
    np.testing.assert_allclose(bar[0], BAR[0], rtol=1e-6)
    assert official.alphas_bar(official.betas("linear"), zero_snr=True, floor=True)[-1] == 2.0**-24


def test_static_shift_comes_twice_at_the_low_end():
    train = official.flow_sigmas(1000, 3.0)
    np.testing.assert_allclose(train[-1], 0.002994, rtol=1e-3)
    sigmas = official.shifted(np.linspace(float(train[0]), float(train[-1]), 5), 3.0)
    np.testing.assert_allclose(sigmas, [1, 0.90036, 0.75112, 0.50299, 0.00893], atol=1e-5)
    moved = official.shifted_by(np.linspace(1, 0.001, 5), 1.15)
    np.testing.assert_allclose(moved, [1, 0.90465, 0.75988, 0.51384, 0.00315], atol=1e-5)
    assert official.shifted_by(np.array([0.5]), 3.0, "linear") == pytest.approx(0.75)
    np.testing.assert_allclose(official.stretched(np.array([1, 0.6, 0.2]), 0.1)[[0, -1]], [1, 0.1])


VARIANTS = {
    "sched_ddpm": [
        *({"beta_schedule": name} for name in ("squaredcos_cap_v2", "sigmoid", "laplace")),
        *({"timestep_spacing": name, "variance_type": "fixed_large"} for name in ("linspace", "trailing")),
        {"prediction_type": "sample", "variance_type": "fixed_small_log"},
        {"thresholding": True, "sample_max_value": 2.0},
        {"trained_betas": list(np.linspace(0.01, 0.5, 50)), "num_train_timesteps": 50},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    "sched_ddim": [
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"timestep_spacing": "linspace", "prediction_type": "sample"},
        {"clip_sample": True, "step": {"eta": 0.5, "use_clipped_model_output": True}},
        {"thresholding": True},
    ],
    "sched_dpmsolver": [
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun", "lower_order_final": False},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True},
        {"solver_order": 3, "euler_at_final": True, "prediction_type": "v_prediction"},
        {"solver_order": 1, "prediction_type": "sample", "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_lu_lambdas": True},
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ],
    "sched_euler": [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
        {"use_beta_sigmas": True},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"final_sigmas_type": "sigma_min", "prediction_type": "sample"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    ],
    "sched_flowmatch": [
        {"use_karras_sigmas": True},
        {"shift_terminal": 0.02, "shift": 2.0},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "set_timesteps": {"mu": 1.5}},
    ],
}


@pytest.mark.parametrize(
    ("system", "changes"), [(system, changes) for system, several in VARIANTS.items() for changes in several], ids=str
)
def test_every_option_walks_to_a_finite_end(system, changes):
    config = json.loads((GOLDEN / system / "config.json").read_text())
    run = next(iter(config["runs"].values()))
    changes = dict(changes)
    run |= {name: changes.pop(name) for name in ("step", "set_timesteps") if name in changes}
    run["scheduler"] |= changes
    config["runs"] = {"it": run}
    n, draw = run["num_inference_steps"], np.random.RandomState(0)
    arrays = {"in_x_T": draw.randn(2, 3, 4).astype(np.float32), "out_it_traj": np.zeros((n + 1, 2, 3, 4), np.float32)}
    if system == "sched_ddpm" or "sde" in str(changes) or "stochastic" in str(changes) or run["step"].get("eta"):
        arrays["in_it_noise"] = draw.randn(n, 2, 3, 4).astype(np.float32)
    lines = []
    case = Case(system, GOLDEN / system, config, arrays, lines.append)
    find(system)[1](case)
    assert not case.close()  # what was "recorded" is zeros; nothing was left out
    error = float(lines[0].split()[2])
    assert np.isfinite(error) and 0.1 < error < 1e5, lines


def test_schedulers_refuse_what_is_not_built():
    system = "sched_ddpm"
    config = json.loads((GOLDEN / system / "config.json").read_text())
    config["runs"]["default"]["scheduler"]["variance_type"] = "learned"
    with pytest.raises(UserError, match="variance_type 'learned' is not supported, only 'fixed_small'"):
        arrays = dict(np.load(GOLDEN / system / "io.npz"))
        find(system)[1](Case(system, GOLDEN / system, config, arrays, lambda line: None))
    assert set(VARIANTS) == {name for name in names() if name.startswith("sched_")}
