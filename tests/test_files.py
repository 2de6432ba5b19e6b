"""app/files.py: rows are named by file and line, files are whole or not there, a directory belongs to one process."""

import gzip
import math
import sys
from subprocess import run

import pytest

from app import files
from worlds import rows


@pytest.mark.parametrize(("name", "line"), [("a.jsonl", 1), ("a.jsonl.gz", 1), ("a.csv", 2)])
def test_rows_come_with_file_and_line_from_here_and_from_the_hub(tmp_path, monkeypatch, name, line):
    content = ("\ufeffa,b\n1,\n" if name == "a.csv" else '\ufeff{"a": "1", "b": ""}\n\n').encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    monkeypatch.setattr(rows, "hf_hub_download", lambda repo, path, repo_type: str(tmp_path / path))
    for where in (f"{tmp_path}/{name}", f"owner/data/{name}"):
        assert list(rows.rows_of(where)) == [(f"{where}:{line}", {"a": "1", "b": ""})]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "{}\n{"), ("a.jsonl", "{}\n[1]"), ("a.csv", "a\nHello, you")])
def test_a_line_that_is_not_a_row_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}:2: cannot be read"):
        list(rows.rows_of(f"{tmp_path}/{name}"))


def test_a_file_is_never_written_through_a_link_and_lacking_figures_are_null_in_it(tmp_path):
    (tmp_path / "other").write_text("untouched")
    for link in ("a.jsonl", "a.jsonl.tmp"):
        (tmp_path / link).symlink_to(tmp_path / "other")
    files.write_lines(tmp_path / "a.jsonl", [{"λ": math.nan}, {"λ": 0.5}])
    assert (tmp_path / "other").read_text() == "untouched" and not (tmp_path / "a.jsonl.tmp").is_symlink()
    assert (tmp_path / "a.jsonl").read_text() == '{"\\u03bb": null}\n{"\\u03bb": 0.5}\n'
    assert math.isnan(files.read_lines(tmp_path / "a.jsonl")[0]["λ"])


def test_a_directory_belongs_to_one_process_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.chdir(tmp_path)
    first, other = files.free_directory(None, "firm"), "from app.files import *; print(free_directory({}))"
    elsewhere = [
        run([sys.executable, "-c", other.format(a)], capture_output=True) for a in ("None, 'firm'", "'runs/firm'")
    ]
    assert elsewhere[0].stdout == b"runs/firm-2\n" and b"another process works in it" in elsewhere[1].stderr
    assert files.free_directory(None, "firm") == first  # nothing is in it yet
    files.write_text(first / "config.json", "{}")
    assert (
        files.free_directory(None, "firm").name == "firm-2" and files.free_directory(str(first), resume=True) == first
    )
