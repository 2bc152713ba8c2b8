"""Reads the pickles of PyTorch weights files with an interpreter of its own that can only build data.

    value = read(stream, persistent)      # allowed.Mapping, list, tuple, Tensor, numbers, text, None

Python's unpickler calls the functions that a file names. This one runs the same opcodes on its own records and has a
table of the few names that weights files need (allowed.py). It imports nothing and calls nothing by name: a name that
is not in the table (`os.system`, any other module) raises Malformed with that name. PyTorch is not needed.

`pickletools` only splits the bytes into opcodes. Dictionaries are kept as pairs, so that no key is hashed: a hostile
file may have keys with colliding hashes, or tuples nested deeper than the C stack. The work that a file can cause is
counted and bounded by `MAX_STEPS`.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from hybridgen.weights.allowed import CALLS, Mapping, Name, Storage, Tensor, name_of
from hybridgen.weights.tensors import Malformed

MAX_STEPS = 1_000_000  # opcodes plus elements passed to calls; enough for some 20,000 tensors

LITERALS = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "UNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
    "FLOAT",
    "BINFLOAT",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_DICT": lambda: Mapping([])}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NOTHING = {"PROTO", "FRAME"}


def read(stream: BinaryIO, persistent: Callable[[Any], Storage]) -> Any:
    """The value of the pickle at the stream's position; the stream is left at the pickle's end.

    persistent: makes a Storage of a persistent id. Raises Malformed for anything but a pickle of weights.
    """
    machine = _Machine(persistent)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.count(1)
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        text = " ".join(str(error)[:80].split())
        raise Malformed(f"its pickle is damaged: {text if text.isprintable() else type(error).__name__}") from None
    raise Malformed("its pickle has no end (STOP)")


class _Machine:
    """A stack, the marks on it and a memo, as in Python's pickle.py; its values are those of allowed.py."""

    def __init__(self, persistent: Callable[[Any], Storage]):
        self.persistent = persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack below each mark
        self.memo: dict[int, Any] = {}
        self.done = 0

    def count(self, steps: int) -> None:
        self.done += steps
        if self.done > MAX_STEPS:
            raise Malformed(f"its pickle takes more than {MAX_STEPS} steps")

    def step(self, opcode: str, argument: Any) -> None:
        """Runs one opcode. Raises Malformed, or Python's errors if the stack does not fit the opcode."""
        if opcode in LITERALS:
            self.stack.append(argument)
        elif opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode in EMPTY:
            self.stack.append(EMPTY[opcode]())
        elif opcode in TUPLES:
            self.stack.append(tuple(self._top(TUPLES[opcode])))
        elif opcode not in NOTHING and not (self._remember(opcode, argument) or self._collect(opcode)):
            self._build(opcode, argument)

    def _top(self, count: int) -> list[Any]:
        """Pops the topmost `count` values from the stack."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def _marked(self) -> list[Any]:
        """Pops everything above the last mark, and the mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _remember(self, opcode: str, argument: Any) -> bool:
        match opcode:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if argument >= 2**32:  # PUT has its number as text, of any length
                    raise ValueError("a memo index is 2^32 or more")
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "DUP":
                self.stack.append(self.stack[-1])
            case "POP":
                self.stack.pop()
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "POP_MARK":
                self._marked()
            case _:
                return False
        return True

    def _collect(self, opcode: str) -> bool:
        match opcode:
            case "TUPLE" | "LIST" | "FROZENSET" | "DICT":
                items = self._marked()  # first: it changes the stack
                kinds = {"TUPLE": tuple, "DICT": lambda items: Mapping(_pairs(items))}
                self.stack.append(kinds.get(opcode, list)(items))
            case "APPEND":
                self._extend(self._top(1))
            case "APPENDS" | "ADDITEMS":
                self._extend(self._marked())
            case "SETITEM":
                self._set(self._top(2))
            case "SETITEMS":
                self._set(self._marked())
            case _:
                return False
        return True

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("items are added to something other than a list")
        self.stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], Mapping):
            raise TypeError("items are set in something other than a dictionary")
        self.stack[-1].pairs.extend(_pairs(items))

    def _build(self, opcode: str, argument: Any) -> None:
        """The opcodes with which Python's unpickler would run code."""
        match opcode:
            case "GLOBAL":
                self.stack.append(name_of(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self.stack.append(name_of(*self._top(2)))
            case "REDUCE" | "NEWOBJ":
                self.stack.append(self._call(*self._top(2)))
            case "BUILD":
                self._state(*self._top(1))
            case "BINPERSID":
                self.stack.append(self.persistent(self.stack.pop()))
            case "INST":
                name_of(*argument.split(" ", 1))
                raise Malformed("its pickle uses INST, which PyTorch never writes")
            case _:
                raise Malformed(f"its pickle uses {opcode}, which PyTorch never writes")

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or function.text not in CALLS or not isinstance(arguments, tuple):
            raise Malformed("its pickle calls something that is not an allowed function")
        # one list can be passed to many calls, each for a single opcode
        sizes = [
            len(item.pairs if isinstance(item, Mapping) else item)
            for item in arguments
            if isinstance(item, Mapping | list | tuple | str | bytes)
        ]
        self.count(sum(sizes) + len(arguments))
        return CALLS[function.text](*arguments)

    def _state(self, state: Any) -> None:
        """Sets attributes: kept for objects with attributes only, ignored for others (a state_dict's `_metadata`)."""
        target = self.stack[-1]
        if isinstance(target, Mapping) and isinstance(state, Mapping):
            if target.attributes:
                self.count(len(state.pairs))
                target.pairs.extend(list(state.pairs))
        elif isinstance(target, np.dtype) and isinstance(state, tuple):
            if state[1] not in ("<", "|", "="):
                raise Malformed("its pickle has big-endian numbers")
        elif not isinstance(target, Tensor):
            raise Malformed("its pickle sets the state of an object that has none")


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a dictionary has an odd number of items")
    return list(zip(items[::2], items[1::2], strict=True))
