"""The command line as its users meet it: a whole small run, its files and figures, --resume, --adapter, --profile."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WORDS, make_model, make_tokenizer
from matplotlib.figure import Figure
from transformers import GPT2Config, GPT2ForSequenceClassification

import run
from app import ranks
from app.session import Session
from methods import METHODS
from rollout import Policy

OBJECTIVES = """
def even(prompts, completions, **columns):
    return [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[0] == "w") / 8 for c in completions]

def short(prompts, completions, **columns):
    return [-len(c.split()) / 8 for c in completions]

def flat(prompts, completions, **columns):
    return [1.0] * len(prompts)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, HH-RLHF prompts and objectives on disk, and no picture drawn by what runs for a whole module."""
    root = tmp_path_factory.mktemp("world")
    make_model("llama").save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    with open(root / "prompts.jsonl", "w") as file:
        for i in range(40):
            asked = f"\n\nHuman: {WORDS[i]} {WORDS[(7 * i) % 46]}\n\nAssistant:"
            file.write(json.dumps({"chosen": asked + " w1", "rejected": asked + " w2", "subset": f"s{i % 3}"}) + "\n")
    (root / "objectives.py").write_text(OBJECTIVES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"\x89PNG"))
        yield root


def command(world, /, **changes) -> list[str]:
    """Flags of a two-round run on `world`; a change of None drops the flag."""
    flags = {
        "model": world / "model", "prompts": world / "prompts.jsonl",
        "objectives": [f"py:{world}/objectives.py:even", f"py:{world}/objectives.py:short"],
        "rounds": 2, "clients": 3, "batch_size": 4, "max_new_tokens": 8, "held_out": 8, "eval_samples": 2, "lr": 1e-2,
        "lora_rank": 4, "kl_coef": 0.01, "threads": 1,
    } | changes  # fmt: skip
    arguments = []
    for name, value in flags.items():
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


@pytest.fixture(scope="module")
def finished(world):
    """The directory of one finished run."""
    assert run.main(command(world, out=world / "finished")) == 0
    return world / "finished"


@pytest.fixture(scope="module")
def observed(world):
    """The same run, evaluated after every round."""
    assert run.main(command(world, eval_every=1, out=world / "observed")) == 0
    return world / "observed"


def refused(capsys, arguments) -> str:
    """The one line that a refused command prints; it must exit with 2."""
    try:
        status = run.main(list(map(str, arguments)))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1].rpartition("\r")[2]  # after a bar that it interrupted
    assert status == 2 and line.startswith("run.py: error: ") and "Traceback" not in error, error
    return line


def adapter_of(directory) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics_of(directory) -> list[dict]:
    """The lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def summary_of(directory) -> dict:
    return json.loads((directory / "summary.json").read_text())


def contents(directory) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_leaves_every_file_that_its_docstring_names(finished):
    assert {p.name for p in finished.iterdir()} - {".lock"} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "adapter", "checkpoint", "rewards.png",
        "weights.png",
    }  # fmt: skip
    assert not list(finished.rglob("*.tmp"))


def test_the_summary_keeps_its_contract(finished):
    summary = summary_of(finished)
    assert {"method", "seed", "seconds", "processes", "rounds", "upload_bytes_per_client_round", "base_model",
            "kl"} <= summary.keys()  # fmt: skip
    for entry in summary["objectives"].values():
        assert all({"mean", "standard_error"} <= entry[key].keys() for key in ("before", "after", "gain"))
        assert entry["gain"]["n_prompts"] == 8


def test_the_metrics_keep_their_contract(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1]
    of_objectives = {f"{kind}/{name}" for kind in ("reward", "lambda") for name in ("even", "short")}
    of_clients = {f"{key}/client{c}" for key in (*of_objectives, "kl") for c in range(3)}
    others = {"kl", "lambda/disagreement", "adapter/dispersion", "upload_bytes", "seconds"}
    assert all(of_objectives | of_clients | others <= line.keys() for line in lines)


def test_gains_are_paired_and_their_errors_clustered_by_prompt(observed):
    kept = ranks.unpacked((observed / "checkpoint").read_bytes()[32:])
    gains = (kept["held_out"][2] - kept["before"]["scores"]).mean(1)  # [n, M], the mean of a prompt's two responses
    for j, entry in enumerate(summary_of(observed)["objectives"].values()):
        assert entry["gain"]["mean"] == pytest.approx(float(gains[:, j].mean()))
        assert entry["gain"]["mean"] == pytest.approx(entry["after"]["mean"] - entry["before"]["mean"])
        assert entry["gain"]["standard_error"] == pytest.approx(float(gains[:, j].std()) / 8**0.5)


def test_the_samples_are_answers_before_and_after_with_their_own_scores(finished):
    lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and any(line["before"]["response"] != line["after"]["response"] for line in lines)
    for answer in (line[stage] for line in lines for stage in ("before", "after")):
        assert answer["scores"]["short"] == pytest.approx(-len(answer["response"].split()) / 8)


def test_equal_seeds_give_equal_bytes_and_another_seed_other_ones(finished, world, tmp_path):
    assert run.main(command(world, out=tmp_path / "again")) == 0
    assert run.main(command(world, out=tmp_path / "other", seed=1)) == 0
    assert adapter_of(tmp_path / "again") == adapter_of(finished) != adapter_of(tmp_path / "other")
    assert metrics_of(tmp_path / "again") == metrics_of(finished)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.several_runs])
def test_every_method_runs_on_three_objectives(world, tmp_path, method):
    three = [f"py:{world}/objectives.py:{name}" for name in ("even", "short", "flat")]
    flags = {"method": method, "objectives": three, "rounds": 1, "eval_samples": 1}
    assert run.main(command(world, out=tmp_path, **flags)) == 0
    assert summary_of(tmp_path)["method"] == method and len(summary_of(tmp_path)["objectives"]) == 3


def test_an_objective_that_never_varies_is_warned_of_and_figures_that_do_not_exist_are_null(world, tmp_path, capsys):
    arguments = command(world, objectives=f"py:{world}/objectives.py:flat", out=tmp_path, rounds=1, eval_samples=1)
    assert run.main(arguments) == 0
    assert "warning: flat gave every response of the base policy the same reward" in capsys.readouterr().out
    assert metrics_of(tmp_path)[0]["cosine"] is None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_sampler_that_draws_from_another_policy_is_warned_of(finished, world, tmp_path, monkeypatch, capsys):
    real = Policy.sample

    def shifted(self, prompts, uniforms):
        rollout = real(self, prompts, uniforms)
        rollout.sampled_logp -= 0.2 * rollout.mask
        return rollout

    monkeypatch.setattr(Policy, "sample", shifted)
    assert run.main(command(world, rounds=1, out=tmp_path)) == 0
    assert "differ by up to 0.2 nats" in capsys.readouterr().out
    assert metrics_of(finished)[0]["logp_gap"] < 1e-3 < metrics_of(tmp_path)[0]["logp_gap"] - 0.19


@pytest.mark.gpu
def test_a_run_on_cuda_leaves_the_same_files(finished, world, tmp_path):
    assert run.main(command(world, out=tmp_path, device="cuda")) == 0
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in finished.iterdir()}


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos> ' }}{% endif %}"
)


def test_the_paper_s_preset_runs_on_a_chat_model_and_two_reward_models(world, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    make_model("llama").save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    size = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "pad_token_id": 0}
    for seed, name in enumerate(("helpful", "harmless")):
        torch.manual_seed(seed)
        GPT2ForSequenceClassification(GPT2Config(**size, num_labels=1)).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    models = [f"{name}=hf:{tmp_path / name}" for name in ("helpful", "harmless")]
    small = command(world, model=tmp_path / "chat", objectives=models, lora_rank=None, lr=None, kl_coef=None)
    assert run.main([*small, "--preset", "tinyllama", "--out", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["dtype"], settings["lora_rank"], settings["kl_coef"]) == ("bfloat16", 16, 0.2)
    assert summary_of(tmp_path / "run")["objectives"].keys() == {"helpful", "harmless"}


def test_evaluating_on_the_way_changes_nothing_and_is_not_repeated_at_the_end(finished, world, tmp_path, monkeypatch):
    labels, real = [], Session.evaluate
    monkeypatch.setattr(Session, "evaluate", lambda self, label, *a: labels.append(label) or real(self, label, *a))
    assert run.main(command(world, eval_every=2, out=tmp_path)) == 0
    assert labels == ["base model", "after round 2"]
    assert adapter_of(tmp_path) == adapter_of(finished)
    assert summary_of(tmp_path)["objectives"] == summary_of(finished)["objectives"]


def test_every_evaluated_round_has_its_figures_and_its_adapter(world, observed, tmp_path):
    first, last = metrics_of(observed)
    summary = summary_of(observed)
    assert last["held_out/even"] == summary["objectives"]["even"]["after"]["mean"]
    assert last["held_out_error/even"] == summary["objectives"]["even"]["after"]["standard_error"]
    rounds = [observed / "adapters" / name / "adapter_model.safetensors" for name in ("round0001", "round0002")]
    assert rounds[1].read_bytes() == adapter_of(observed) != rounds[0].read_bytes()

    # Without a round a run only evaluates; gains are over the base model, which --adapter leaves as it is.
    assert run.main(command(world, rounds=0, adapter=rounds[0].parent, out=tmp_path)) == 0
    again = summary_of(tmp_path)
    assert again["objectives"]["even"]["after"]["mean"] == first["held_out/even"]
    assert again["objectives"]["even"]["before"] == summary["objectives"]["even"]["before"]
    assert again["kl"]["mean"] == pytest.approx(first["held_out_kl"])
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_training_may_start_from_an_adapter_which_the_checkpoint_then_holds(world, observed, tmp_path):
    shutil.copytree(observed / "adapters" / "round0001", tmp_path / "start")
    assert run.main(command(world, rounds=1, adapter=tmp_path / "start", out=tmp_path / "run")) == 0
    assert metrics_of(tmp_path / "run")[0]["kl"] != 0.0 == metrics_of(observed)[0]["kl"]  # of the first responses
    shutil.rmtree(tmp_path / "start")
    assert run.main(["--resume", str(tmp_path / "run"), "--rounds", "2"]) == 0


def test_the_reasoning_world_s_clients_have_a_table_of_their_own(tmp_path, capsys, monkeypatch):
    asked_of, evaluate = {}, Session.evaluate  # the subsets on which a client's own adapter is measured

    def noted(self, title, which=None):
        asked_of[title] = {self.held_out[i].subset for i in range(len(self.held_out)) if which is None or i in which}
        return evaluate(self, title, which)

    monkeypatch.setattr(Session, "evaluate", noted)
    small = ["--rounds", "1", "--batch_size", "4", "--held_out", "16", "--eval_samples", "1", "--personal_rounds", "1"]
    assert run.main(["--preset", "fedmoa-tiny", *small, "--out", str(tmp_path)]) == 0
    lines = summary_of(tmp_path)["by_client"]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {line["task"] for line in lines} == {"code", "mathematics"}
    for line in lines:
        assert line["subsets"][0].startswith(line["task"])
        assert line["objectives"] == ["accuracy", "format"] + ["length"] * (line["task"] == "mathematics")
        asked = [sample for sample in samples if sample["subset"] in line["subsets"]]
        assert line["held_out"] == len(asked) > 0
        for stage in ("before", "after"):
            mean = sum(sample[stage]["scores"]["accuracy"] for sample in asked) / len(asked)
            assert line["primary"][stage]["mean"] == pytest.approx(mean)
        assert 0.0 <= line["primary"]["personal"]["mean"] <= 1.0
        assert asked_of[f"client {line['client']}"] == set(line["subsets"])
    table = capsys.readouterr().out
    assert all(
        re.search(rf"^{line['client']} +{line['task']} +{line['subsets'][0]}", table, re.MULTILINE) for line in lines
    )
    adapters = {(tmp_path / "personal" / f"client{c}" / "adapter_model.safetensors").read_bytes() for c in range(8)}
    assert len(adapters | {adapter_of(tmp_path)}) == 9


def test_a_finished_run_can_be_extended_to_what_a_longer_run_gives_and_not_shortened(world, tmp_path, capsys):
    assert run.main(command(world, out=tmp_path / "long", rounds=3, eval_every=2)) == 0
    assert run.main(command(world, out=tmp_path / "short", rounds=2, eval_every=2)) == 0
    assert summary_of(tmp_path / "short")["best"] is None  # of one evaluated round
    assert run.main(["--resume", str(tmp_path / "short"), "--rounds", "3"]) == 0
    assert adapter_of(tmp_path / "short") == adapter_of(tmp_path / "long")
    assert metrics_of(tmp_path / "short") == metrics_of(tmp_path / "long")
    assert summary_of(tmp_path / "short")["best"] == summary_of(tmp_path / "long")["best"] is not None
    assert "rounds: 3 are done already" in refused(capsys, ["--resume", tmp_path / "short", "--rounds", "2"])


def test_an_out_that_holds_a_run_is_refused_and_left_alone(finished, world, capsys):
    before = contents(finished)
    assert "is not empty" in refused(capsys, command(world, out=finished))
    assert contents(finished) == before


def test_the_plain_command_runs_on_the_toy_world_under_the_next_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--rounds", "1", "--held_out", "8", "--eval_samples", "1", "--batch_size", "4", "--clients", "2"]
    for _ in range(2):
        assert run.main([*small, "--advantages", "group"]) == 0
    assert sorted(p.parent.name for p in tmp_path.glob("runs/*/front.png")) == ["firm-group-tiny", "firm-group-tiny-2"]


def test_diagnostics_add_figures_and_grams_and_change_nothing_else(finished, world, tmp_path):
    assert run.main(command(world, out=tmp_path, diagnostics=[])) == 0
    assert adapter_of(tmp_path) == adapter_of(finished)
    plain, looked = metrics_of(finished), metrics_of(tmp_path)
    assert looked[0].keys() > plain[0].keys()
    assert [{key: line[key] for key in plain[0]} for line in looked] == plain
    assert len(list((tmp_path / "grams").iterdir())) == 2


def test_profile_shows_the_time_of_the_rounds_alone_and_changes_nothing(finished, world, tmp_path, capsys):
    assert run.main(command(world, out=tmp_path, profile=[])) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("firm.py", "(local_update)", "(round)", "peak memory"))
    assert "(begin)" not in printed  # before the rounds
    assert adapter_of(tmp_path) == adapter_of(finished)
