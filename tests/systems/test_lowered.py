"""A refactoring changes no program: the lowered programs and parameters of every system equal the recorded ones.

If a change of the arithmetic is intended, state it in the commit and record again: `python tests/lowered.py record`.
"""

import json

import jax
import lowered
import pytest

RECORD = json.loads(lowered.RECORDED.read_text(encoding="utf-8"))


def test_every_system_is_recorded():
    assert sorted(RECORD["systems"]) == sorted(lowered.systems())


@pytest.mark.parametrize("system", lowered.systems())
def test_programs_are_as_recorded(system):
    """On another version of JAX, which may lower otherwise: the parameters alone."""
    recorded, found = RECORD["systems"][system], lowered.texts(system)
    names = list(found) if jax.__version__ == RECORD["jax"] else ["parameters"]
    digests = {name: lowered.digest(found[name]) for name in names}
    assert digests == {name: recorded.get(name) for name in names} and found.keys() == recorded.keys()


def test_another_program_is_another_text():
    """The comparison sees a number, and does not see a name."""

    def program(name: str, factor: float) -> str:
        function = jax.jit(lambda x: x * factor)
        function.__wrapped__.__name__ = name
        return lowered.lowered(function, lowered.spec((3,)))

    assert program("one", 2.0) == program("another", 2.0) != program("one", 3.0)
