"""Text that users give may begin with a byte-order mark; text that is written is UTF-8 in every locale."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hybridgen import sample
from hybridgen.core.errors import UserError
from hybridgen.data import files, sources, text
from hybridgen.data.text import published
from hybridgen.runs import drawing
from hybridgen.training import logging
from hybridgen.weights.files import open_weights

ROOT = Path(__file__).parents[2]
PROMPTS = ["a cat", "红色的圆形", "naïve \u2028 line"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16"]  # Python writes the last with a mark


def requested(path):
    return [prompt for prompt, _ in sample.read_requests(argparse.Namespace(prompt=[], prompts=path, label=[]))]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old mac"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_prompts(encoding, end, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(end.join([*PROMPTS, ""]).encode(encoding))
    assert requested(tmp_path / "prompts.txt") == PROMPTS


def test_prompts_in_another_encoding_are_refused(tmp_path):
    for data in ("红色".encode("gbk"), b"\xff\xfea"):
        (tmp_path / "prompts.txt").write_bytes(data)
        with pytest.raises(UserError, match="cannot read .*prompts.txt: it is not UTF-8"):
            requested(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf\n")
    with pytest.raises(UserError, match="has no prompts"):
        requested(tmp_path / "prompts.txt")


def test_a_prompt_that_begins_with_a_mark_is_the_one_without():
    tokenizer = text.Bytes(24)
    for prompt in PROMPTS:
        marked, plain = (drawing.text_cond(tokenizer, [start + prompt]) for start in ("\ufeff", ""))
        assert all((marked[name] == plain[name]).all() for name in plain)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json(encoding, tmp_path):
    (tmp_path / "a.json").write_bytes(json.dumps({"a": "圆"}, ensure_ascii=False).encode(encoding))
    assert files.read_json(tmp_path / "a.json") == {"a": "圆"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_captions_beside_pictures(encoding, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("红色的圆形\r\n".encode(encoding))
    assert sources.Folder(tmp_path, resolution=8, validation=0)[0]["text"] == "红色的圆形"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata(name, tmp_path):
    lines = {"metadata.jsonl": '{"file_name": "a.png", "text": "圆"}\n', "metadata.csv": "file_name,text\na.png,圆\n"}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_bytes(lines[name].encode(encoding))
        assert sources.Folder(tmp_path, resolution=8, validation=0)[0]["text"] == "圆"
    (tmp_path / name).write_bytes(lines[name].encode("utf-16"))
    with pytest.raises(UserError, match=f"{name} is in UTF-16: save it in UTF-8"):
        sources.Folder(tmp_path, resolution=8, validation=0)


def test_merges_of_clip(tmp_path):
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "ab</w>": 4, "b</w>": 5}
    for encoding in ENCODINGS:
        (tmp_path / "merges.txt").write_bytes("#version: 0.2\r\na b</w>\r\n".encode(encoding))
        assert published._clip(vocab, tmp_path / "merges.txt")["model"]["merges"] == [["a", "b</w>"]]


def test_an_index_of_shards(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\xef\xbb\xbf" + b'{"weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(UserError, match="x.safetensors"):  # the index was read
        open_weights(tmp_path)


def test_a_note_with_another_end_of_line_stays_in_the_log(tmp_path):
    log = tmp_path / "metrics.jsonl"
    entries = [
        json.dumps({"step": step, "note": "broken_record", "text": "a\u2028b\x85"}, ensure_ascii=False)
        for step in (1, 9)
    ]
    log.write_text("\n".join([*entries, '{"step": 1']), encoding="utf-8")
    logging.cut_back(log, 3)
    assert log.read_text(encoding="utf-8") == entries[0] + "\n"


WRITES = """
import sys
from pathlib import Path
from hybridgen import cli
from hybridgen.runs import folder
from hybridgen.training import logging

def main():
    path = Path(sys.argv[1])
    folder.write_json(path / "config.json", {"a": "\\u5706"})
    options = {"every": 1, "label": "train", "timer": logging.Timer()}
    writer = logging.Writer(path, start_step=0, total_steps=1, **options)
    writer.note(0, "broken_record", "\\u5706.png")
    writer.close()
    return 0

cli.command(main)
"""


def test_what_is_written_is_utf_8_in_every_locale(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", WRITES, str(tmp_path)]
    done = subprocess.run(line, env=os.environ | ascii_only, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "config.json").read_bytes()) == {"a": "圆"}
    assert "圆.png" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
