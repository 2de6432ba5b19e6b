"""What README.md and the pages of docs/ and results/ say can be done: links, commands, examples."""

import json
import re
import shlex
from pathlib import Path

import pytest

import methods
import run
from app import options, sweep

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `python run.py …` on a page."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    return [shlex.split(words) for words in re.findall(r"\b(?:python|torchrun[^\n]*?) run\.py ?([^\n`#&]*)", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_every_module_that_a_page_names_is_there(page):
    text = page.read_text("utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    named = {name for name in re.findall(r"`([\w/]+\.py)", text) if name != "mine.py"}
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing and not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=f"{page.stem} {shlex.join(words)}") for page in PAGES for words in commands(page)]
)
def test_every_command_is_one_that_run_py_takes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/firm-tiny").mkdir(parents=True)  # as --resume wants it
    Path("runs/firm-tiny/config.json").write_text(json.dumps(vars(options.parse([])[0])))
    config, commands = options.parse(words)  # ends the program on bad usage
    if commands.sweep or commands.compare:
        assert sweep.plan(config, commands.sweep, commands.compare)
    elif config.method != methods.PREDICTOR:
        methods.check(config)


def test_every_figure_of_a_claim_stands_in_the_page_that_it_links_to():
    rows = re.findall(r"\| ([^|]*) \(\[runs\]\((\S+)\)\)", README.read_text("utf-8"))
    assert len(rows) > 8
    for measured, page in rows:
        there = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?", (ROOT / page).read_text("utf-8"))
        for figure in re.findall(r"\d+\.\d+", measured):
            form = f".{len(figure.partition('.')[2])}f"
            assert any(f"{float(x):{form}}" == figure for x in there), (figure, page)


def test_the_readme_is_short():
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 110 and max(map(len, lines)) <= 120 and sum(len(line.split()) for line in lines) <= 1000


def test_the_readme_names_every_method():
    assert set(re.findall(r"`([a-z]+)`", README.read_text("utf-8"))) >= methods.METHODS.keys()


def test_the_readmes_lines_for_peft_answer_a_prompt(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="needs requirements-dev.txt")
    monkeypatch.chdir(tmp_path)
    short = ["--rounds", "1", "--held_out", "4", "--eval_samples", "1", "--out", "runs/firm-tiny"]
    assert run.main(short) == 0
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_example_of_a_reward_file_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "real-files.md").read_text("utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    Path("mine.py").write_text(next(code for code in examples if "def" in code))
    topics = ("shelves", "bread", "lamps") * 5
    rows = [{"prompt": f"{i} tell me about {word} .", "keyword": word} for i, word in enumerate(topics)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ["--rounds", "1", "--held_out", "1", "--eval_samples", "1", "--clients", "1", "--split", "iid"]
    named = ["--objectives", "py:mine.py:polite", "py:mine.py:to_the_point", "--prompts", "rows.jsonl"]
    assert run.main([*short, *named, "--out", "run"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["objectives"].keys() == {"polite", "to_the_point"}
