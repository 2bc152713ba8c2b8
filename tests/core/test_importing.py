"""Config files and what they import: from any folder, in a clone and from a wheel; errors in them take one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from hybridgen import __version__
from hybridgen.core import config as config_lib
from hybridgen.core import importing
from hybridgen.core.errors import UserError

ROOT = Path(__file__).parents[2]
PLAIN = "from configs import common\n\n\ndef get_config(variant):\n    return common.stage('x', {}, {}, steps=%d)\n"


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The modules and the path of the other tests."""
    before = {name: found for name, found in sys.modules.items() if name.split(".")[0] == "configs"}
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_a_config_anywhere_imports_hybridgens_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry or Path(entry).resolve() != ROOT])
    (tmp_path / "mine.py").write_text(PLAIN % 7)
    assert config_lib.load("mine.py").steps == 7
    assert config_lib.load("configs/ar/raster.py:tiny").family == "ar.raster"  # the same path, from any folder
    with pytest.raises(UserError, match="no config file 'configs/ar/rasta.py'"):
        config_lib.load("configs/ar/rasta.py")


def test_a_folder_of_ones_own_named_configs_adds_to_hybridgens(tmp_path):
    own = tmp_path / "configs" / "ar"
    own.mkdir(parents=True)
    (own / "mine.py").write_text("from configs.ar import near, raster\n" + PLAIN.replace("%d", "near.STEPS"))
    (own / "near.py").write_text("STEPS = 9\n")
    assert config_lib.load(str(own / "mine.py")).steps == 9
    (tmp_path / "configs" / "common.py").write_text("STEPS = 1\n")
    message = f"{tmp_path}/configs/common.py has the name of a config of hybridgen .* rename the folder or the file"
    with pytest.raises(UserError, match=message):
        config_lib.load(str(own / "mine.py"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs", dirs_exist_ok=True)  # a whole copy is used alone
    with (tmp_path / "configs" / "common.py").open("a") as file:
        file.write("\n\ndef stage(*_, **changes):\n    return ConfigDict({'steps': 5})\n")
    assert config_lib.load(str(own / "mine.py")).steps == 5
    assert config_lib.load(f"{ROOT}/configs/ar/raster.py:tiny").steps == 20  # again hybridgen's


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import nowhere\n", r"cannot be imported: No module named 'nowhere' \(mine.py, line 1\)"),
        ("\nfrom configs import comon\n", r"cannot be imported: cannot import name 'comon' .* \(mine.py, line 2\)"),
        ("def get_config(:\n", r"cannot be imported: .*\(mine.py, line 1\)"),
        ("x = 1 / 0\n", r"cannot be imported: ZeroDivisionError: division by zero \(mine.py, line 1\)"),
        ("def get_config(v):\n    return {}[v]\n", r"mine.py: KeyError: '' \(mine.py, line 2\)"),
        ("def get_config(v):\n    import nowhere\n", r"mine.py: No module named 'nowhere' \(mine.py, line 2\)"),
    ],
)
def test_an_error_in_a_config_takes_one_line(text, says, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        config_lib.load(str(tmp_path / "mine.py"))
    assert "\n" not in str(error.value)


def test_a_module_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_data").mkdir()
    (tmp_path / "my_data" / "source.py").write_text("class Sqlite:\n    pass\n")
    (tmp_path / "my_data" / "broken.py").write_text("\nimport hybridgen.nn.mpl\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert importing.member("my_data.source.Sqlite", "data.source").__name__ == "Sqlite"
    for path, says in (
        ("my_data.source", "'my_data.source' is a module: name a class in it, such as 'my_data.source.Sqlite'"),
        ("my_data.source.Sqlit", "my_data.source has no 'Sqlit'; did you mean 'Sqlite'?"),
        ("my_data.sauce.Sqlite", "Python finds no module 'my_data.sauce' (is its folder in PYTHONPATH?)"),
        ("my_data.broken.X", "cannot be imported: No module named 'hybridgen.nn.mpl' (broken.py, line 2)"),
        ("a b.c", "Python finds no module 'a b'"),
    ):
        with pytest.raises(UserError) as error:
            importing.member(path, "data.source")
        assert says in str(error.value) and str(error.value).startswith("data.source ")


@pytest.mark.parametrize("module", ["hybridgen", "hybridgen.cli"])
def test_python_m_is_the_console_script(module):
    for words, says in ((["--version"], f"hybridgen {__version__}\n"), ([], "usage: hybridgen COMMAND")):
        done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(says)
    done = subprocess.run([sys.executable, "-m", module, "trian"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: unknown command 'trian'; did you mean 'train'?\n")


@pytest.mark.slow
@pytest.mark.skipif(int(setuptools.__version__.split(".")[0]) < 77, reason="builds with setuptools 77 or later")
def test_an_installed_wheel_has_the_configs(tmp_path):
    """`pip install .` without a clone: configs by the same path, and for a config of one's own."""
    for name in ("hybridgen", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    words = ["install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", tmp_path / "installed"]
    subprocess.run([sys.executable, "-m", "pip", *words, tmp_path / "clone"], check=True)
    shutil.rmtree(tmp_path / "clone")
    assert (tmp_path / "installed" / "hybridgen" / "py.typed").is_file()
    (tmp_path / "mine.py").write_text(PLAIN % 7)
    script = "from hybridgen.core import config\n"
    script += "print(config.load('configs/ar/raster.py:tiny').family, config.load('mine.py').steps)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    line = [sys.executable, "-P", "-c", script]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "ar.raster 7\n", done.stderr
