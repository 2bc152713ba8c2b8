"""Hostile folders of images and runs are refused in one line, without a hang and with little memory.

More of folders of pictures is in test_folder.py, of files of weights in test_untrusted.py.
"""

import ast
import json
import os
import stat
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image
from test_untrusted import HUGE, refused

from hybridgen import cli
from hybridgen.core import config as config_lib
from hybridgen.core import hostmemory, quiet
from hybridgen.data import sources, text
from hybridgen.runs import folder as run_folder
from hybridgen.runs import manifest, reading
from hybridgen.runs.checkpoint import Checkpointer

ROOT = Path(__file__).parents[2]


def folder(path, **options):
    return sources.Folder(path, **{"resolution": 8, "validation": 0, **options})


def test_hostile_lines_of_metadata_are_skipped_and_counted(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    good = {"file_name": "ok.png", "text": "fine", "kind": "x", "part": "train"}
    deep = [b"[" * depth + b"]" * depth for depth in (50, 900, 960, 990, 100_000)]
    values = [*deep, b"NaN", b"-Infinity", b"null", b"true", b"1e999", b"9" * 5000, b'{"a": NaN}']
    lines = [
        json.dumps(good | {key: "@"}).encode().replace(b'"@"', value)
        for key in ("file_name", "text", "kind", "part")
        for value in values
    ]
    lines += [
        json.dumps(good | {"file_name": name}).encode()
        for name in (
            "/dev/zero",
            "/dev/stdin",
            "/proc/self/mem",
            "../ok.png",
            "ok.png\0",
            "\x1b]0;x\x07",
            "a" * 5000,
            "//x/ok.png",
        )
    ]
    lines += [b"\0" * 1000, b"{" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1", b'"ok.png"', b"[]", b"null"]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join([json.dumps(good).encode(), *lines]) + b"\n")
    start = time.process_time()
    source = folder(tmp_path, label_key="kind", split_key="part")
    count, words = source.problems(1000)
    assert time.process_time() - start < 1 and len(source) == 1 + len(lines)
    assert count == len(lines) and all(line.isprintable() and len(line) < 400 for line in words)
    assert source[0]["text"] == "fine" and source.class_names == ["x"]


def test_metadata_that_is_no_file_of_the_folder(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "ok.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "ok.png", "text": "x"}')
    for make, says in [
        (os.mkfifo, "is not a file"),
        (os.mkdir, "is not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
        (lambda path: path.symlink_to(tmp_path / "metadata.jsonl"), "is a link to a file outside the folder"),
    ]:
        path = tmp_path / "a" / "metadata.jsonl"
        make(path)
        assert says in refused(folder, tmp_path / "a")
        path.rmdir() if path.is_dir() else path.unlink()


def test_pictures_that_swell_or_never_end(tmp_path):
    """A header of padding only, chunks that decompress to gigabytes, a link to a device."""
    (tmp_path / "padding.jpg").write_bytes(b"\xff\xd8" + b"\xff" * 2**24)
    (tmp_path / "segments.jpg").write_bytes(b"\xff\xd8" + b"\xff\xfe\x00\x02" * 2**22)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    swollen = zlib.compress(b"\0" * 2**27, 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    for name, kind, words in (("text", b"zTXt", b"a\0\0"), ("profile", b"iCCP", b"a\0\0"), ("pixels", b"IDAT", b"")):
        body = head + chunk(kind, words + swollen) + chunk(b"IDAT", zlib.compress(b"\0" * 200)) + chunk(b"IEND", b"")
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    (tmp_path / "device.png").symlink_to("/dev/zero")
    source = folder(tmp_path)
    assert len(source) == 6
    for index in range(len(source)):
        start = time.process_time()
        tracemalloc.start()
        try:
            image = source[index]["image"]
            assert image.shape == (8, 8, 3) and source.name(index) in ("text.png", "profile.png", "pixels.png")
        except sources.BrokenRecord as error:
            assert str(error).isprintable()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - start < 1 and peak < 48 * 2**20, (source.name(index), peak)


# ---- folders of runs


RUN = ROOT / "configs" / "ar" / "raster.py"


def changed(data, key, value):
    """A copy of nested dicts with the entry "a.b" set."""
    *path, last = key.split(".")
    out = node = json.loads(json.dumps(data))
    for name in path:
        node = node[name]
    node[last] = value
    return out


def test_a_config_of_somebody(tmp_path):
    plain = config_lib.plain(config_lib.load(f"{RUN}:tiny"))
    plain["model"] |= {"classes": 0, "grid": [4, 4], "text_length": 16, "text_vocab": 50, "vocab": 64}
    path = tmp_path / "config.json"
    values = [("family", value) for value in ("os", "..train", "losses", "a\0b\n", "", 5, None, ["x"], {"a": 1})]
    values += [("model.width", value) for value in ("big", HUGE, -1, 0, 1.5, [HUGE], True, {})]
    values += [("model.grid", HUGE), ("model.nonsense", 1), ("model.dtype", "object"), ("model.heads", [])]
    values += [("mesh.data", "all"), ("mesh.tensor", HUGE), ("batch", "8"), ("steps", 1e300), ("seed", -1)]
    values += [(name, value) for name in ("model", "data", "mesh", "parts", "sample") for value in ("x", [], None)]
    values += [("stages", "x"), ("stages", {"a": 1}), ("trainable", [["(", True]]), ("a", {"b.c": 1})]
    for key, value in values:
        path.write_text(json.dumps(changed(plain, key, value)))
        says = refused(reading.load, tmp_path)
        assert str(path) in says or "no family" in says or "is not a family" in says, (key, value)
    for raw in [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b"[]",
        b"null",
        b"",
        b"\0" * 9,
        b'{"a":' + b"9" * 5000 + b"}",
        b"\xff",
        b'"\\ud800"',
    ]:
        path.write_bytes(raw)
        assert f"{path} is not the config of a run" in refused(config_lib.read, path)
    os.truncate(path, 2**33)  # eight gigabytes of nothing
    assert "bytes" in refused(config_lib.read, path)
    path.write_text(json.dumps(plain))
    assert "no usable checkpoint" in refused(reading.load, tmp_path)


def test_the_json_of_a_run_of_somebody(tmp_path):
    path = tmp_path / "text.json"
    for raw in (b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe\xff", b"9" * 5000, b"{"):
        path.write_bytes(raw)
        assert "is not valid JSON" in refused(run_folder.read_json, path)
    os.truncate(path, 2**33)
    assert "bytes" in refused(run_folder.read_json, path, megabytes=80)
    deep = json.loads("[" * 500 + "]" * 500)
    for data in (
        [],
        None,
        deep,
        {"kind": deep},
        {"kind": "words", "words": deep, "length": 4},
        {"kind": "bytes"},
        {"kind": "words", "words": [1], "length": 4},
        {"kind": "words", "words": [], "length": HUGE},
        {"kind": "bytes", "length": -1},
        {"kind": "bytes", "length": "4"},
    ):
        refused(text.from_json, data)


def test_a_manifest_of_somebody(tmp_path):
    """A forged manifest has a correct digest."""
    step = tmp_path / "0"
    (step / "model").mkdir(parents=True)
    os.mkfifo(step / "model" / "pipe")
    (step / "model" / "zero").symlink_to("/dev/zero")
    leads_out = [(name, "unreadable") for name in ("../../../dev/zero", "/dev/zero", "model/../../x", "", ".")]
    for name, says in [*leads_out, ("model/pipe", "not a regular file"), ("model/zero", "not a regular file")]:
        body = {"step": 0, "processes": 1, "files": {name: [0, "x"]}}
        run_folder.write_json(step / "manifest.json", body | {"digest": manifest._digest(body)})
        (fault,) = manifest.faults(step, 0)
        assert says in fault
    for files in ([], {"a": 1}, {"a": [1]}, {"a": ["1", "x"]}, {"a": [1, 2]}, "x"):
        body = {"step": 0, "processes": 1, "files": files}
        run_folder.write_json(step / "manifest.json", body | {"digest": manifest._digest(body)})
        assert "unreadable" in manifest.faults(step, 0)[0]
    (step / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(manifest.Damaged, match="RecursionError"):
        manifest.read(step, 0)


# ---- what is promised of the code


def test_only_the_converter_opens_pickles():
    """Training and sampling read safetensors or Orbax; no other module imports anything that can unpickle."""
    names = {"pickle", "_pickle", "pickletools", "torch", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
    files = [path for top in ("hybridgen", "configs") for path in sorted((ROOT / top).rglob("*.py"))]
    found = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = [name for name in modules if name.partition(".")[0] in names]
            options = {word.arg: word.value for word in node.keywords} if isinstance(node, ast.Call) else {}
            allowed = options.get("allow_pickle")
            if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
                bad.append("allow_pickle")
            bad += [called] if called in ("read_pickle", "unsafe_load", "Unpickler") else []
            if bad:
                found[str(path.relative_to(ROOT))] = bad
    assert len(files) > 50 and found == {"hybridgen/weights/pickles.py": ["pickletools"]}  # which only splits bytes


def test_the_compile_cache_is_its_owners(tmp_path, monkeypatch):
    """If the environment names a folder, it is created private; an existing one, and a bucket, are not changed."""
    for module, name in ((hostmemory, "keep"), (quiet, "failed_saves")):  # they are for the whole process
        monkeypatch.setattr(module, name, lambda: None)
    old = os.umask(0)
    try:
        (tmp_path / "shared").mkdir(mode=0o755)
        for name in ("new/cache", "shared"):
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / name))
            with pytest.raises(SystemExit):
                cli.command(lambda: 0)
        monkeypatch.chdir(tmp_path)
        for name in ("gs://bucket/cache", ""):
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", name)
            cli.own_cache()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new" / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "shared"]


def test_folders_are_their_owners(tmp_path):
    """Folders of runs, checkpoints and compile caches are created with access for their owner only."""
    old = os.umask(0)
    try:
        run = run_folder.make(tmp_path / "run")
        Checkpointer(run / "checkpoints").close()
    finally:
        os.umask(old)
    for path in (run, run / "checkpoints"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (ROOT / "hybridgen").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        owned = "rundir.make(" in source or "tempfile.TemporaryDirectory(" in source
        assert "jax_compilation_cache_dir" not in source or owned, path
