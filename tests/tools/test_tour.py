"""The notebook docs/tour.ipynb runs from its first cell to its last, and holds no outputs."""

import json
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cells() -> list[str]:
    """The sources of the code cells."""
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    kept = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in kept)
    return ["".join(cell["source"]) for cell in kept]


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    names = {}
    for number, source in enumerate(cells()):
        exec(compile(source, f"cell {number}", "exec"), names)
    assert len(names["images"]) == 8 and names["both"].shape == (32, 64, 3)
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert report["splits"]["validation"]["from captions"]["render"]["judge"]["all"]["pictures"] == 16
    assert '"step": 10' in capsys.readouterr().out
