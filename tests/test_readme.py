"""What README.md and the pages of docs/ and results/ say is so: methods, modules, links, commands, figures."""

import contextlib
import csv
import importlib.util
import io
import json
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import pluralllm
import run
from app import session, sweep
from settings import METHODS, parse

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the one Markdown table whose first heading is this, without its heading."""
    lines = page.read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `python …` on a page, in a block or in a line of text."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    return [shlex.split(found) for found in re.findall(r"\bpython ((?:\w+\.py|-m )[^\n`#&]*)", text)]


COMMANDS = [pytest.param(words, id=f"{page.stem} {shlex.join(words)}") for page in PAGES for words in commands(page)]


@cache
def flags_of(program: str) -> set[str]:
    """What `python PROGRAM --help` or `python -m PROGRAM --help` says there is."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, "--help"])
        with pytest.raises(SystemExit) as stop:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert not stop.value.code
    return set(re.findall(r"--[\w-]+", out.getvalue()))


def flags_in(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def test_the_readme_has_at_most_150_lines():
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_the_readmes_table_of_methods_is_the_registry():
    rows = {row[0].strip("`"): (row[1], row[4]) for row in table(README, "method")}
    assert rows == {name: (m.help, "yes" if m.takes_preference else "no") for name, m in METHODS.items()}


def test_the_readme_says_of_every_method_whether_and_when_the_server_picks_lambda():
    for name, _, who, *_ in table(README, "method"):
        method = METHODS[name.strip("`")]
        picks = {"before": method.server_weights, "after": method.server_mixing}
        assert who.startswith("the server") == any(picks.values())
        assert all(f"{when} the local runs" in who for when, part in picks.items() if part)


def test_the_readme_names_every_module_and_every_folder_of_code():
    listing = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout, so that the project's files cannot be told from the user's")
    present = {re.sub(r"/.*", "/", name) for name in listing.stdout.split()}
    assert set(re.findall(r"`([^`]+)`", " ".join(row[0] for row in table(README, "module")))) == present


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_points_to_a_file(page):
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8"))]
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_code_that_a_page_names_is_there(page):
    named = set(re.findall(r"`([\w/]+\.py)", page.read_text("utf-8")))
    assert not [name for name in named - {"mine.py"} if not (ROOT / name).is_file()]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_one_that_its_program_takes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, *arguments = words
    if program == "run.py":
        saved = Path("runs/firm-tiny")  # as --resume wants it
        (saved / "checkpoint").mkdir(parents=True)
        (saved / "checkpoint" / "state.safetensors").touch()
        (saved / "config.json").write_text(json.dumps(parse([])[0].flat()))
        config, _, preferences, methods = parse(arguments)  # ends the program on bad usage
        if preferences or methods:
            sweep.plan(config, preferences, methods)
        elif config.run.method != pluralllm.NAME and not config.data.prompts:  # whose files would have to be there
            session.check(config)
        return
    if program == "-m":
        program, *arguments = arguments
        assert importlib.util.find_spec(program)
    if program.startswith("evidence."):
        pytest.importorskip("scipy", reason="the evidence needs requirements-dev.txt")
    if program.startswith("evidence.") or program.endswith(".py"):
        if "--flags" in arguments:  # of run.py, for the bench
            cut = arguments.index("--flags") + 1
            parse(["--preset", "tinyllama", *arguments[cut:]])
            arguments = arguments[:cut]
        assert flags_in(arguments) <= flags_of(program)


def test_the_experiments_that_the_pages_name_exist():
    experiments = pytest.importorskip("evidence.experiments", reason="needs requirements-dev.txt")
    named = {words[2] for page in PAGES for words in commands(page) if words[1:2] == ["evidence.experiments"]}
    assert named - {"NAME"} <= {"all", *experiments.EXPERIMENTS}


def test_the_readmes_lines_for_peft_answer_a_prompt(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="needs requirements-dev.txt")
    monkeypatch.chdir(tmp_path)
    short = ["--rounds", "1", "--held_out", "4", "--eval_samples", "1", "--out", "runs/firm-tiny"]
    assert run.main(short) == 0
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "merged" / "model.safetensors").is_file() and (tmp_path / "merged" / "tokenizer.json").is_file()


def test_the_example_of_a_reward_file_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "real-files.md").read_text("utf-8")
    Path("mine.py").write_text(
        next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def" in code)
    )
    rows = [
        {"prompt": f"hello , tell me about {word} .", "keyword": word} for word in ("shelves", "bread", "lamps") * 5
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row | {"n": i}) + "\n" for i, row in enumerate(rows)))
    short = ["--rounds", "1", "--held_out", "1", "--eval_samples", "1", "--clients", "1", "--split", "iid"]
    named = ["--objectives", "py:mine.py:polite", "py:mine.py:to_the_point", "--prompts", "rows.jsonl"]
    assert run.main([*short, *named, "--out", "run"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["objectives"].keys() == {"polite", "to_the_point"}


def test_metrics_are_read_by_the_lines_for_pandas(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    Path("runs/firm-tiny").mkdir(parents=True)
    line = {"round": 0, "reward/helpful": 0.5, "kl": 0.0, "reward/helpful/client0": 0.25}
    Path("runs/firm-tiny/metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = (ROOT / "docs" / "real-files.md").read_text("utf-8")
    exec(next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "print(metrics" in code), {})
    assert "0.25" in capsys.readouterr().out


def number(text: str) -> tuple[float, int]:
    """`−0.28 ± 0.03` -> its value, and how many digits behind the point are written."""
    value = text.split(" ±")[0].replace("−", "-")
    return float(value), len(value.partition(".")[2])


def test_the_figures_of_critic_and_groups_are_the_csvs_rounded():
    found, figures = {}, ("worst_gain", "kl", "explained_variance_helpful", "explained_variance_harmless")
    with open(ROOT / "results" / "groups.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            settings = json.loads(row["settings"])
            if settings["kl_coef"] == 0.003:
                label = (settings["method"], settings.get("beta"), settings.get("advantages"))
                found.setdefault(label, []).append([float(row[figure]) for figure in figures])
    means = {label: [statistics.mean(column) for column in zip(*rows, strict=True)] for label, rows in found.items()}
    assert {len(rows) for rows in found.values()} == {10}
    lines = table(ROOT / "results" / "README.md", "method")
    assert 2 * len(lines) == len(means)
    for label, gains, difference, _, kls, explained in lines:
        method, _, beta = label.partition(", β = ")
        critic, groups = (
            means[method, float(beta) if float(beta or 0.01) != 0.01 else None, a] for a in (None, "group")
        )
        expected = [critic[0], groups[0], groups[0] - critic[0], critic[1], groups[1], *critic[2:]]
        written = [*gains.split("; "), difference, *kls.split("; "), *explained.split("; ")]
        for value, (shown, digits) in zip(expected, map(number, written), strict=True):
            assert value == pytest.approx(shown, abs=0.501 * 10**-digits)


def test_the_hypervolumes_of_the_sweep_are_its_tables_rounded():
    whole = {label: number(volume)[0] for label, volume, *_ in table(ROOT / "results" / "pareto.md", "method")}
    page = (ROOT / "results" / "README.md").read_text("utf-8")
    shown = dict(re.findall(r"^\| ([^|]+) \| (0\.\d+) ± [\d.]+ \| 1\.00", page, re.MULTILINE))
    assert len(shown) == len(whole)
    for label, volume in shown.items():
        assert whole[label.replace(", β = ", " β=").replace(",", "")] == pytest.approx(float(volume), abs=6e-4)


@pytest.mark.parametrize("name", ["common", "learners"])
def test_the_worst_gains_that_the_results_page_shows_are_its_tables(name):
    page = (ROOT / "results" / "README.md").read_text("utf-8")
    head, _, *lines = (ROOT / "results" / f"{name}.md").read_text("utf-8").partition("\n\n")[0].splitlines()
    column = head.split("|").index(" worst normalised gain ")
    for line in lines:
        mean, half = map(float, line.split("|")[column].split(" ± "))
        assert f"{mean:.3f} ± {half:.3f}" in page


def test_every_fault_of_the_table_has_the_test_that_it_names():
    for *_, named in table(ROOT / "docs" / "faults.md", "what happens"):
        for file, words in re.findall(r"`tests/(test_\w+\.py)(?:::([\w…]+))?`", named):
            functions = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text("utf-8"), re.MULTILINE)
            pattern = ".*".join(map(re.escape, words.split("…")))
            assert any(re.match(pattern, function) for function in functions), named
