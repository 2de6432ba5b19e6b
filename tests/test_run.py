"""The command line as its users meet it: a whole small run, its files, going on after a crash, and bad input."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import WORDS, make_model, make_tokenizer
from huggingface_hub.utils import close_session, get_session
from transformers import AutoModelForCausalLM, GPT2Config, GPT2ForSequenceClassification

import clients
import run
from app import report
from app.session import Evaluation, Session, names_of
from data import Prompt
from firm import Federation
from rollout import Policy
from settings import METHODS, PRESETS, SETTINGS, Config

OBJECTIVES = """
def even(prompts, completions, **columns):
    return [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[0] == "w") / 8 for c in completions]

def short(prompts, completions, **columns):
    return [-len(c.split()) / 8 for c in completions]

def broken(prompts, completions, **columns):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, HH-RLHF prompts and two objectives on disk, and the command line that names them."""
    root = tmp_path_factory.mktemp("world")
    make_model("llama").save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    with gzip.open(root / "prompts.jsonl.gz", "wt") as file:
        for i in range(40):
            asked = f"\n\nHuman: {WORDS[i]} {WORDS[(7 * i) % 46]}\n\nAssistant:"
            file.write(json.dumps({"chosen": asked + " w1", "rejected": asked + " w2", "subset": f"s{i % 3}"}) + "\n")
    (root / "objectives.py").write_text(OBJECTIVES)
    return root


def command(world, /, **changes) -> list[str]:
    """Flags of a two-round run on `world`; a change of None drops the flag."""
    flags = {
        "model": world / "model", "prompts": world / "prompts.jsonl.gz",
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


def refused(capsys, arguments) -> str:
    """The one line that a refused command prints; it must exit with 2."""
    try:
        status = run.main(arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2, error
    lines = error.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("run.py: error: ")
    return lines[0]


def test_a_preference_is_refused_where_the_method_takes_none(world, capsys):
    assert run.main(command(world, method="fsmgda", preference=[0.3, 0.7])) == 2
    assert "preference: fsmgda takes none" in capsys.readouterr().err


def test_a_run_leaves_every_file_that_the_readme_names(finished):
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "adapter", "checkpoint", "rewards.png",
        "weights.png",
    }  # fmt: skip


@pytest.fixture(scope="module")
def observed(world):
    """The same run, evaluated after every round."""
    assert run.main(command(world, eval_every=1, out=world / "observed")) == 0
    return world / "observed"


def test_evaluating_on_the_way_changes_nothing_that_is_trained(finished, observed):
    assert adapter_of(observed) == adapter_of(finished)
    assert "held_out_kl" not in metrics_without_times(finished)[0]


def test_every_evaluated_round_has_its_figures_and_its_adapter(world, observed, tmp_path):
    first, last = metrics_without_times(observed)
    after = json.loads((observed / "summary.json").read_text())
    assert last["held_out/even"] == after["objectives"]["even"]["after"]["mean"]
    assert last["held_out_error/even"] == after["objectives"]["even"]["after"]["standard_error"]
    assert last["held_out_kl"] == pytest.approx(after["kl"]["mean"])
    kept = [observed / "adapters" / name / "adapter_model.safetensors" for name in ("round0001", "round0002")]
    assert kept[1].read_bytes() == adapter_of(observed) != kept[0].read_bytes()
    arguments = command(world, rounds=0, adapter=kept[0].parent, out=tmp_path / "again")
    assert run.main(arguments) == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["objectives"]["even"]["after"]["mean"] == first["held_out/even"]
    assert again["objectives"]["even"]["before"] == after["objectives"]["even"]["before"]  # the base model's
    assert again["kl"]["mean"] == pytest.approx(first["held_out_kl"])


def test_the_best_round_is_chosen_on_one_half_and_reported_on_the_other(finished, observed):
    assert json.loads((finished / "summary.json").read_text())["best"] is None
    best = json.loads((observed / "summary.json").read_text())["best"]
    states = safetensors.torch.load_file(observed / "checkpoint" / "state.safetensors")
    before = states["before.scores"]
    with safetensors.safe_open(observed / "checkpoint" / "state.safetensors", "pt") as opened:
        scale = json.loads(opened.metadata()["values"].partition("{")[2].join(["{", ""]))["calibration"]["scale"]
    gains = {}
    for t in (1, 2):
        scores = safetensors.torch.load_file(observed / "adapters" / f"round{t:04d}" / "held_out.safetensors")["scores"]
        gains[t] = (scores - before).mean(1)  # [n, M]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    worst = {t: min(float(own[order[:4], j].mean()) / scale[j] for j in (0, 1)) for t, own in gains.items()}
    assert best["round"] == max(worst, key=worst.get)
    assert best["gain"]["short"]["mean"] == pytest.approx(float(gains[best["round"]][order[4:], 1].mean()))


@pytest.mark.parametrize(
    ("constant", "n", "best"),
    [((False, False), 8, 1), ((True, False), 8, 2), ((True, True), 8, None), ((False, False), 3, None)],
)
def test_the_best_round_is_that_of_what_can_move_and_of_no_fewer_than_four_prompts(tmp_path, constant, n, best):
    gains = {1: (0.0, 0.1), 2: (-0.1, 0.2), 9: (1.0, 1.0)}  # the last is of a longer run that was here before
    whole = {t: Evaluation(torch.tensor(own).expand(n, 1, 2), torch.zeros(n, 1), []) for t, own in gains.items()}
    (tmp_path / "round0001-good").mkdir()  # a user's copy
    for t in (1, 9):
        (tmp_path / f"round{t:04d}").mkdir()
        safetensors.torch.save_file(
            {"scores": whole[t].scores.contiguous()}, tmp_path / f"round{t:04d}" / "held_out.safetensors"
        )
    calibration = SimpleNamespace(scale=torch.ones(2), constant=torch.tensor(constant))
    session = SimpleNamespace(
        config=SimpleNamespace(firm=SimpleNamespace(rounds=2)), held_out=[None] * n, names=["a", "b"],
        federation=SimpleNamespace(calibration=calibration),
    )  # fmt: skip
    before = Evaluation(torch.zeros(n, 1, 2), torch.zeros(n, 1), [])
    found = report.best_round(session, before, whole[2], tmp_path)
    assert found == best if best is None else found["round"] == best


def test_training_may_start_from_an_adapter_and_its_reference_is_the_base_model(world, observed, tmp_path):
    shutil.copytree(observed / "adapters" / "round0001", tmp_path / "start")
    assert run.main(command(world, rounds=1, adapter=tmp_path / "start", out=tmp_path / "run")) == 0
    shutil.rmtree(tmp_path / "start")  # the checkpoint has it now
    assert metrics_without_times(tmp_path / "run")[0]["kl"] != 0.0  # of its first responses; from nothing it is 0
    assert metrics_without_times(observed)[0]["kl"] == 0.0
    assert run.main(["--resume", str(tmp_path / "run"), "--rounds", "2"]) == 0


def test_an_adapter_of_another_base_model_is_warned_of(world, observed, tmp_path, capsys):
    shutil.copytree(observed / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "elsewhere"}))
    assert run.main(command(world, rounds=0, adapter=tmp_path / "adapter", out=tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    assert "warning: the adapter is of elsewhere, and is put on" in printed
    assert "gains are over the base model without --adapter" in printed
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": ["odd"]}))
    assert run.main(command(world, rounds=0, adapter=tmp_path / "adapter", out=tmp_path / "odd")) == 0
    (tmp_path / "same").symlink_to(world / "model")
    arguments = command(world, rounds=0, adapter=observed / "adapter", out=tmp_path / "other", model=tmp_path / "same")
    assert run.main(arguments) == 0
    assert "warning: the adapter" not in capsys.readouterr().out


def test_an_adapter_that_does_not_fit_is_refused_before_any_work(world, observed, tmp_path, capsys):
    arguments = command(world, lora_rank=3, adapter=observed / "adapter", out=tmp_path / "run")
    assert "set lora_rank and lora_alpha" in refused(capsys, arguments)
    assert not (tmp_path / "run").exists()
    assert "adapter_config.json is missing" in refused(capsys, command(world, adapter=tmp_path, out=tmp_path / "run"))


def test_the_worst_served_client_is_named_in_the_table_and_the_summary(finished):
    worst = json.loads((finished / "summary.json").read_text())["worst_served"]
    last = metrics_without_times(finished)[-1]
    assert worst["reward"] == last[f"reward/{worst['objective']}/client{worst['client']}"]
    rewards = [last[f"reward/{worst['objective']}/client{c}"] for c in range(3)]
    assert worst["reward"] == min(rewards) and worst["others"] == 2
    assert worst["mean_of_others"] == pytest.approx((sum(rewards) - min(rewards)) / 2)


def test_clients_go_by_the_names_that_the_split_gives_them(world, tmp_path, capsys):
    assert run.main(command(world, split="subset", out=tmp_path / "run")) == 0
    summary, printed = json.loads((tmp_path / "run" / "summary.json").read_text()), capsys.readouterr().out
    assert summary["client_names"] == ["s0", "s1", "s2"] and "(subset: s0, s1, s2)" in printed
    worst = summary["worst_served"]
    assert worst["name"] == f"s{worst['client']}" and f"client {worst['client']} ({worst['name']}), " in printed


@pytest.mark.parametrize(
    ("constant", "rounds", "clients", "worst"),
    [
        ((False, False), 2, 2, (1, "b")),
        ((False, True), 2, 2, (0, "a")),
        ((True, True), 2, 2, None),
        ((False, False), 1, 2, None),
        ((False, False), 2, 1, None),
    ],
)
def test_the_worst_served_is_one_of_several_after_training_in_what_can_move(constant, rounds, clients, worst):
    line = {"reward/a/client0": 0.1, "reward/a/client1": 0.2, "reward/b/client0": 0.3, "reward/b/client1": 0.0}
    calibration = SimpleNamespace(mean=torch.zeros(2), scale=torch.ones(2), constant=torch.tensor(constant))
    members = [SimpleNamespace(index=c, objectives=[0, 1], prompts_held=5) for c in range(clients)]
    federation = SimpleNamespace(clients=members, calibration=calibration)
    session = SimpleNamespace(names=["a", "b"], client_names=[], federation=federation)
    found = report.worst_served(session, [line] * rounds)
    assert found == worst if worst is None else (found["client"], found["objective"]) == worst


def test_a_last_round_that_was_evaluated_is_not_evaluated_again(world, tmp_path, monkeypatch):
    labels, real = [], Session.evaluate
    monkeypatch.setattr(Session, "evaluate", lambda self, label, *a: labels.append(label) or real(self, label, *a))
    assert run.main(command(world, eval_every=2, out=tmp_path / "run")) == 0
    assert labels == ["base model", "after round 2"]


def test_where_no_best_round_can_be_named_the_table_says_why(world, tmp_path, capsys):
    assert run.main(command(world, eval_every=3, out=tmp_path / "run")) == 0
    assert "best round: none, as it takes one within --eval_every" in capsys.readouterr().out


def test_a_client_is_measured_on_what_the_split_would_give_it_else_on_its_subsets():
    prompts = [
        Prompt("", (), "", (), subset, {"country": country})
        for subset, country in (("a", "chile"), ("a", "peru"), ("b", "chile"), ("b", None))
    ]
    session = SimpleNamespace(owner=lambda prompt: prompt.owner("country"), shares=[prompts[:1], prompts[1:2]])
    session.held_out = prompts[2:]
    assert [Session.of_kind(session, c) for c in (0, 1)] == [[0], [0, 1]]  # nobody asks what the second one asks
    session.held_out = prompts[1:]
    assert [Session.of_kind(session, c) for c in (0, 1)] == [[1], [0]]
    session.owner = None
    assert [Session.of_kind(session, c) for c in (0, 1)] == [[0], [0]]


@pytest.mark.parametrize(
    ("owners", "names"),
    [
        (["/x/a/train.jsonl", "/x/b/train.jsonl"], ["a/train.jsonl", "b/train.jsonl"]),
        (["/x/a/p.jsonl", "/y/a/p.jsonl"], ["/x/a/p.jsonl", "/y/a/p.jsonl"]),
        (["south/america/chile", "south/america/peru"], ["south/america/chile", "south/america/peru"]),
    ],
)
def test_clients_are_called_by_short_names_where_those_tell_them_apart(owners, names):
    assert names_of(owners) == names


def test_no_temporary_file_is_left(finished):
    assert not list(finished.rglob("*.tmp"))


def test_the_summary_keeps_its_contract(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert {"method", "seed", "seconds", "rounds", "upload_bytes_per_client_round", "base_model"} <= summary.keys()
    for objective in ("even", "short"):
        entry = summary["objectives"][objective]
        for key in ("before", "after", "gain"):
            assert {"mean", "standard_error"} <= entry[key].keys()
        assert entry["gain"]["n_prompts"] == 8
        assert entry["gain"]["mean"] == pytest.approx(entry["after"]["mean"] - entry["before"]["mean"])


def test_the_metrics_hold_a_line_a_round_with_the_promised_names(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [m["round"] for m in lines] == [0, 1]
    promised = {"reward/even", "reward/short", "kl", "lambda/even", "lambda/short", "lambda/disagreement",
                "adapter/dispersion", "upload_bytes", "seconds"}  # fmt: skip
    assert all(promised <= m.keys() for m in lines)


def test_the_samples_answer_the_same_prompts_before_and_after(finished):
    lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert all(line["before"]["scores"].keys() == line["after"]["scores"].keys() == {"even", "short"} for line in lines)


def test_the_gain_is_paired_and_its_error_clustered_by_prompt(finished, world):
    # Recomputed from nothing but the definition: prompt means first, then mean and standard error over prompts.
    session = Session(Config.from_flat(json.loads((finished / "config.json").read_text())), progress=False)
    before = session.restore(finished / "checkpoint")
    after = session.evaluate("")
    difference = (after.scores - before.scores)[..., 0].mean(1)
    gain = json.loads((finished / "summary.json").read_text())["objectives"]["even"]["gain"]
    assert gain["mean"] == pytest.approx(float(difference.mean()))
    assert gain["standard_error"] == pytest.approx(float(difference.std() / 8**0.5))


def test_the_evaluation_uses_the_same_uniforms_every_time(finished):
    session = Session(Config.from_flat(json.loads((finished / "config.json").read_text())), progress=False)
    assert torch.equal(session.evaluate("").scores, session.evaluate("").scores)


def test_no_client_trains_on_a_held_out_prompt(finished):
    session = Session(Config.from_flat(json.loads((finished / "config.json").read_text())), progress=False)
    trained_on = {p.text for share in session.shares for p in share}
    assert not trained_on & {p.text for p in session.held_out}
    assert len(trained_on) + len(session.held_out) == session.counts["kept"]


def test_the_samples_scores_are_those_of_their_texts(finished):
    for line in (finished / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in ("before", "after"):
            assert row[key]["scores"]["short"] == pytest.approx(-len(row[key]["response"].split()) / 8)


def test_the_samples_before_are_the_base_models(finished):
    session = Session(Config.from_flat(json.loads((finished / "config.json").read_text())), progress=False)
    base, lines = session.evaluate(""), (finished / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["before"]["response"] for line in lines] == base.texts
    assert [json.loads(line)["after"]["response"] for line in lines] != base.texts


@torch.no_grad()
def test_the_reported_kl_is_the_trained_policys_on_held_out_prompts(finished, monkeypatch):
    session = Session(Config.from_flat(json.loads((finished / "config.json").read_text())), progress=False)
    assert float(session.evaluate("").kl.abs().max()) == 0.0  # the base model's
    session.restore(finished / "checkpoint")
    sample, drawn = session.policy.sample, []
    monkeypatch.setattr(session.policy, "sample", lambda *args: drawn.append(sample(*args)) or drawn[-1])
    reported = session.evaluate("").kl.flatten()
    kl = json.loads((finished / "summary.json").read_text())["kl"]
    assert kl["mean"] == pytest.approx(float(reported.mean()), abs=1e-6)

    expected = []  # from the model's own logits, one response at a time
    for i, (prompts, seen, responses, mask) in enumerate(
        row
        for batch in drawn
        for row in zip(batch.prompts, batch.prompt_mask, batch.responses, batch.mask, strict=True)
    ):
        ids = torch.cat([prompts[seen == 1], responses[mask == 1]])[None]
        positions = slice(int(seen.sum()) - 1, -1)
        on = session.policy.model(input_ids=ids).logits[0, positions].log_softmax(-1)
        with session.policy.adapter.disabled():
            off = session.policy.model(input_ids=ids).logits[0, positions].log_softmax(-1)
        expected.append(float((on.exp() * (on - off)).sum()))
        assert reported[i] == pytest.approx(expected[-1], rel=1e-3, abs=1e-5)
    assert len(expected) == len(reported) and min(expected) > 1e-3


def test_the_calibration_is_mean_and_deviation_over_all_clients_samples(finished):
    session = Session(Config.from_flat(json.loads((finished / "config.json").read_text())), progress=False)
    raw = session.federation.respond(session.federation.clients, clients.CALIBRATION).raw
    saved = json.loads((finished / "summary.json").read_text())["objectives"]
    for j, name in enumerate(("even", "short")):
        assert saved[name]["calibration"]["mean"] == pytest.approx(float(raw[:, j].mean()))
        assert saved[name]["calibration"]["scale"] == pytest.approx(float(raw[:, j].std(correction=0)))


def test_the_bytes_in_all_count_every_sampled_client_of_every_round(world, tmp_path):
    assert run.main(command(world, out=tmp_path / "few", clients_per_round=2)) == 0
    summary = json.loads((tmp_path / "few" / "summary.json").read_text())
    assert summary["upload_bytes_total"] == 2 * 2 * summary["upload_bytes_per_client_round"]


def test_dirichlets_alpha_reaches_the_split(world):
    def subsets_per_client(alpha):
        session = Session(run.parse(command(world, dirichlet_alpha=alpha))[0], progress=False)
        return [len({p.subset for p in share}) for share in session.shares]

    assert sum(subsets_per_client(1e-6)) < sum(subsets_per_client(1e6)) == 9


def test_the_seed_reaches_the_adapters_start(world):
    starts = [Session(run.parse(command(world, seed=s))[0], progress=False).federation.theta for s in (0, 1)]
    assert not torch.equal(*starts)


def test_the_temperature_reaches_the_policy(world):
    assert Session(run.parse(command(world, temperature=0.5))[0], progress=False).policy.temperature == 0.5


def test_the_closing_table_shows_gains_in_the_base_policys_scale(world, tmp_path, capsys):
    assert run.main(command(world, out=tmp_path / "table")) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("short"))
    entry = json.loads((tmp_path / "table" / "summary.json").read_text())["objectives"]["short"]
    assert float(row.split()[-1]) == pytest.approx(entry["gain"]["mean"] / entry["calibration"]["scale"], abs=0.006)


def test_peft_loads_the_adapter_of_a_run(finished, world):
    peft = pytest.importorskip("peft", reason="parity needs peft (requirements-dev.txt)")
    session = Session(Config.from_flat(json.loads((finished / "config.json").read_text())), progress=False)
    session.policy.adapter.load(finished / "adapter")
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = base(input_ids=ids).logits.clone()
        theirs = peft.PeftModel.from_pretrained(base, finished / "adapter").eval()(input_ids=ids).logits
        ours = session.policy.model(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - plain).abs().max() > 1e-2


def metrics_without_times(directory) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k != "seconds"} for m in lines]


def adapter_of(directory) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_same_seed_repeats_a_run_bit_for_bit(finished, world, tmp_path):
    assert run.main(command(world, out=tmp_path / "again")) == 0
    assert adapter_of(tmp_path / "again") == adapter_of(finished)
    assert repr(metrics_without_times(tmp_path / "again")) == repr(metrics_without_times(finished))


def test_another_seed_gives_another_run(finished, world, tmp_path):
    assert run.main(command(world, out=tmp_path / "other", seed=1)) == 0
    assert adapter_of(tmp_path / "other") != adapter_of(finished)


@pytest.mark.parametrize("crash", ["between rounds", "before the checkpoint"])
def test_a_crashed_run_goes_on_to_the_same_result(finished, world, tmp_path, monkeypatch, capsys, crash):
    owner, name = {
        "between rounds": (Federation, "round"),
        "before the checkpoint": (Session, "save"),
    }[crash]
    real, calls = getattr(owner, name), []

    def crashing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, crashing)
    assert run.main(command(world, out=tmp_path / "crashed")) == 130
    monkeypatch.undo()
    assert not (tmp_path / "crashed" / "summary.json").exists()
    assert f"--resume {tmp_path / 'crashed'}" in capsys.readouterr().out or crash == "before the checkpoint"
    assert run.main(["--resume", str(tmp_path / "crashed")]) == 0
    assert adapter_of(tmp_path / "crashed") == adapter_of(finished)
    assert repr(metrics_without_times(tmp_path / "crashed")) == repr(metrics_without_times(finished))


def edited_copy(finished, out, **changes):
    """A finished run as another version may have left it: settings changed in its file, None takes one out."""
    shutil.copytree(finished, out)
    settings = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return out


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(finished, tmp_path):
    out = edited_copy(finished, tmp_path / "old", diagnostics=None, rounds=3)
    assert run.main(["--resume", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["diagnostics"] is False
    assert len(metrics_without_times(out)) == 3


def test_a_setting_that_was_removed_since_is_left_out_with_a_line(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("settings.REMOVED", {"momentum": 0.0})
    assert run.main(["--resume", str(edited_copy(finished, tmp_path / "old", momentum=0.0))]) == 0
    assert "momentum does not exist any more" in capsys.readouterr().out
    out = edited_copy(finished, tmp_path / "other", momentum=0.9)
    assert "momentum 0.9 does not exist any more" in refused(capsys, ["--resume", str(out)])


@pytest.mark.parametrize("setting", ["value_clip", "critic_lr"])
def test_a_run_of_the_older_critic_cannot_go_on(finished, tmp_path, capsys, setting):
    out = edited_copy(finished, tmp_path / "old", **{setting: 0.2})
    assert f"{setting} 0.2 does not exist any more; go on with an older version" in refused(
        capsys, ["--resume", str(out)]
    )


def test_a_run_with_groups_keeps_no_critic_anywhere_and_goes_on_bit_for_bit(world, tmp_path):
    arguments = command(world, out=tmp_path / "whole", advantages="group", group_size=2)
    assert run.main(arguments) == 0
    assert run.main([*command(world, out=tmp_path / "half", advantages="group", group_size=2), "--rounds", "1"]) == 0
    kept = safetensors.torch.load_file(tmp_path / "half" / "checkpoint" / "state.safetensors")
    assert set(kept) == {"theta", "before.scores", "before.kl"}
    assert run.main(["--resume", str(tmp_path / "half"), "--rounds", "2"]) == 0
    assert adapter_of(tmp_path / "half") == adapter_of(tmp_path / "whole")
    assert not any("explained_variance" in key for key in metrics_without_times(tmp_path / "whole")[0])


def test_a_run_with_other_advantages_says_so_in_its_directory_and_its_header(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.main(["--advantages", "group", "--rounds", "1", "--held_out", "4", "--eval_samples", "1"]) == 0
    assert Path("runs/firm-group-tiny").is_dir() and "16 responses each, 4 to a prompt" in capsys.readouterr().out


def test_a_setting_that_nobody_knows_is_refused_by_name(finished, tmp_path, capsys):
    out = edited_copy(finished, tmp_path / "newer", momentum=0.9)
    assert "momentum" in refused(capsys, ["--resume", str(out)])


def test_diagnostics_add_their_columns_and_change_nothing_that_is_trained(finished, world, tmp_path):
    assert run.main([*command(world, out=tmp_path / "observed"), "--diagnostics"]) == 0
    assert adapter_of(tmp_path / "observed") == adapter_of(finished)
    plain, observed = metrics_without_times(finished), metrics_without_times(tmp_path / "observed")
    assert observed[0].keys() - plain[0].keys() == {"drift", "stationarity"}
    assert repr([{k: line[k] for k in plain[0]} for line in observed]) == repr(plain)
    assert len(list((tmp_path / "observed" / "grams").iterdir())) == 2


def test_nothing_that_trains_imports_the_evidence():
    code = "import run, sys; print([name for name in sys.modules if name.split('.')[0] == 'evidence'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(run.__file__).parent)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.gpu
def test_a_run_on_cuda_leaves_the_same_files(finished, world, tmp_path):
    assert run.main(command(world, out=tmp_path / "cuda", device="cuda")) == 0
    assert {p.name for p in (tmp_path / "cuda").iterdir()} == {p.name for p in finished.iterdir()}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.mixes])
def test_every_method_runs(world, tmp_path, method):
    assert run.main(command(world, out=tmp_path / method, method=method, rounds=1)) == 0
    assert json.loads((tmp_path / method / "summary.json").read_text())["method"] == method


def test_three_objectives_run(world, tmp_path):
    three = [f"py:{world}/objectives.py:even", f"py:{world}/objectives.py:short", "rule:distinct"]
    assert run.main(command(world, out=tmp_path / "three", objectives=three, rounds=1, preference=[1, 1, 2])) == 0
    assert json.loads((tmp_path / "three" / "summary.json").read_text())["objectives"].keys() == {
        "even", "short", "distinct",
    }  # fmt: skip


def test_without_out_the_next_free_name_is_taken(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run.main(command(world, rounds=1, preset="tiny")) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["firm-tiny", "firm-tiny-2"]


def test_every_preset_key_is_a_field():
    known = {f.name for group in SETTINGS.values() for f in fields(group)}
    assert all(preset.keys() <= known for preset in PRESETS.values())


def test_field_names_are_unique():
    names = [f.name for group in SETTINGS.values() for f in fields(group)]
    assert len(names) == len(set(names))


def test_every_preset_builds_a_valid_configuration():
    for name in PRESETS:
        assert run.parse(["--preset", name])[0].run.preset == name


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos> ' }}{% endif %}"
)


@pytest.fixture
def stand_ins(world, tmp_path):
    """What the tinyllama presets name, in small and on disk: a chat model and two GPT-2 reward models."""
    make_model("llama").save_pretrained(tmp_path / "chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    objectives = []
    for seed, name in enumerate(("helpful", "harmless")):
        torch.manual_seed(seed)
        size = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
        GPT2ForSequenceClassification(GPT2Config(**size, num_labels=1, pad_token_id=0)).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        objectives.append(f"{name}=hf:{tmp_path / name}")
    return {"model": tmp_path / "chat", "objectives": objectives, "min_prompt_tokens": 1}


@pytest.fixture
def network(monkeypatch):
    """The hosts that were asked for; nobody answers."""
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # else nobody would ask
    close_session()  # the hub's client may have been made offline
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", lambda self, address: refuse(address))
    return asked


@pytest.mark.parametrize("preset", ["tinyllama", "tinyllama-12gb"])
def test_the_presets_run_from_local_directories_without_one_network_call(world, stand_ins, network, tmp_path, preset):
    flags = command(world, **stand_ins, preset=preset, out=tmp_path / "run", lora_rank=None, lr=None, kl_coef=None)
    assert run.main(flags) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["dtype"], settings["reward_dtype"], settings["lora_rank"]) == ("bfloat16", "bfloat16", 16)
    assert network == []


def test_the_hubs_own_client_would_have_been_seen(network):
    with pytest.raises(Exception, match="no network"):
        get_session().get("https://huggingface.co")
    assert network == ["huggingface.co"]


def test_profile_prints_where_the_rounds_time_went_and_keeps_it(world, tmp_path, capsys):
    assert run.main([*command(world, out=tmp_path / "run"), "--profile"]) == 0
    profile = json.loads((tmp_path / "run" / "summary.json").read_text())["profile"]
    assert set(profile["seconds"]) == {"sample", "score", "reference", "update", "aggregate", "metrics", "other"}
    assert profile["rounds"] == 2 and profile["peak_gib"] > 0.05
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(profile["seconds"].values()) >= sum(line["seconds"] for line in lines)
    printed = capsys.readouterr().out
    assert re.search(r"update +[\d.]+ +\d+%", printed) and "peak memory of the process" in printed


def test_a_sampler_that_draws_from_another_policy_is_reported(world, tmp_path, monkeypatch, capsys):
    honest = Policy.sample

    def shifted(self, prompts, uniforms):
        rollout = honest(self, prompts, uniforms)
        rollout.sampled_logp -= 0.2 * rollout.mask
        return rollout

    assert run.main(command(world, rounds=1, out=tmp_path / "honest")) == 0
    assert "log-probs at sampling" not in capsys.readouterr().out
    monkeypatch.setattr(Policy, "sample", shifted)
    assert run.main(command(world, rounds=1, out=tmp_path / "shifted")) == 0
    assert "differ by up to 0.2 nats" in capsys.readouterr().out


def test_objectives_of_the_embedded_world_are_found_where_older_runs_name_them():
    older = {"objectives": ["py:toy.py:helpful", "short=py:toy.py:twin", "py:my/toy.py:own"]}
    moved = ["py:worlds/toy.py:helpful", "short=py:worlds/toy.py:twin", "py:my/toy.py:own"]
    assert Config.from_flat(older).run.objectives == moved


def test_a_flag_overrides_its_preset():
    assert run.parse(["--preset", "tinyllama", "--lr", "0.5"])[0].client.lr == 0.5


def test_help_prints_every_flag_and_every_method(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"{name}: {method.help.split()[0]}" in " ".join(text.split()) for name, method in METHODS.items())
    assert all(f"--{f.name}" in text for group in SETTINGS.values() for f in fields(group))
    assert not re.search(r"--\w+-\w", text.partition("options:")[2]) and "None)" not in text  # one spelling
    places = [text.index(heading) for heading in ("commands:", "the run (run.py):", "the adapter (lora.py):")]
    assert places == sorted(places)


def test_files_are_named_from_the_root_so_that_a_run_goes_on_from_another_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    given = ["py:objectives.py:even", "short=py:objectives.py:short"]
    changes = {"model": "model", "prompts": "prompts.jsonl.gz", "objectives": given, "out": tmp_path / "r", "rounds": 1}
    assert run.main(command(world, **changes)) == 0
    monkeypatch.chdir(tmp_path)
    assert run.main(["--resume", "r", "--rounds", "2"]) == 0


def test_a_linked_prompt_file_keeps_the_name_that_says_what_it_holds(tmp_path):
    (tmp_path / "blob").write_text("")
    (tmp_path / "harmless.jsonl").symlink_to(tmp_path / "blob")
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "own.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "data" / "sub")
    config, *_ = run.parse(["--prompts", f"{tmp_path}/harmless.jsonl", f"{tmp_path}/link/../own.jsonl", "none"])
    assert config.data.prompts == [f"{tmp_path}/harmless.jsonl", f"{tmp_path}/data/own.jsonl", "none"]


def test_only_what_is_there_is_named_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rm").mkdir()
    given = ["a=hf:rm", "hf:nobody/rm", "rule:length", "b=group:rm:north-1", "py:worlds/toy.py:helpful"]
    found = run.parse(["--objectives", *given, "--model", "nobody/none", "--prompts", "x"])[0].run.objectives
    assert found == [f"a=hf:{tmp_path}/rm", *given[1:3], f"b=group:{tmp_path}/rm:north-1", given[4]]


def test_settings_survive_their_file():
    config = run.parse(["--beta", "0.3", "--preference", "1", "3"])[0]
    assert Config.from_flat(json.loads(json.dumps(config.flat()))) == config


BAD_FLAGS = {
    "an unknown flag": (["--learning", "3"], "unknown option"),
    "an abbreviated flag": (["--pref", "1", "2"], "unknown option"),
    "a stray word": (["more"], "unknown option"),
    "a word for a number": (["--beta", "much"], "beta"),
    "a negative beta": (["--beta", "-1"], "beta"),
    "rank zero": (["--lora_rank", "0"], "lora_rank"),
    "an unknown method": (["--method", "magic"], "method.*firm"),
    "an unknown preset": (["--preset", "huge"], "preset.*tiny"),
    "a negative preference": (["--preference", "1", "-1"], "preference"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_refused_in_one_line(case, capsys):
    arguments, message = BAD_FLAGS[case]
    assert re.search(message, refused(capsys, arguments))


BAD_INPUT = {
    "a preference of the wrong length": ({"preference": [1, 2, 3]}, "preference"),
    "a missing prompt file": ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    "a model without prompts": ({"prompts": None}, "prompts"),
    "no objective": ({"objectives": None}, "objectives"),
    "two objectives of one name": ({"objectives": ["rule:length", "length=rule:brevity"]}, "length"),
    "an unknown rule": ({"objectives": ["rule:charm"]}, "charm"),
    "no prompt short enough": ({"max_prompt_tokens": 1}, "prompts"),
    "fewer prompts than clients": ({"clients": 100}, "clients"),
    "more clients in a round than there are": (
        {"clients_per_round": 9},
        "clients_per_round: 9 is more than clients, 3",
    ),
    "too many held out": ({"held_out": 40}, "held_out"),
    "no module of that name": ({"lora_targets": "query"}, "lora_targets"),
    "a response longer than the context": ({"max_new_tokens": 64}, "max_new_tokens"),
    "a missing model": ({"model": "nobody/no-such-model"}, "--model DIR"),
    "groups that do not fill a batch": ({"advantages": "group", "group_size": 3}, "group_size: 3 does not divide"),
    "groups of one": ({"advantages": "group", "group_size": 1}, "group_size: a group of 1"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(case, world, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    changes, message = BAD_INPUT[case]
    assert message in refused(capsys, command(world, out=tmp_path / "never", **changes))
    assert not (tmp_path / "never").exists()


def test_cuda_asked_for_and_absent_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device" in refused(capsys, ["--device", "cuda"])


def test_a_malformed_prompt_file_is_named_with_its_line(world, capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"chosen": "\\n\\nHuman: w1\\n\\nAssistant: w2"}\n{"chosen": \n')
    assert "bad.jsonl:2" in refused(capsys, command(world, prompts=tmp_path / "bad.jsonl"))


def test_an_out_that_holds_a_run_is_refused_and_left_alone(finished, world, capsys):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert "--resume" in refused(capsys, command(world, out=finished))
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def test_nan_rewards_name_the_objective_and_the_prompt(world, capsys, tmp_path):
    arguments = command(world, objectives=[f"py:{world}/objectives.py:even", f"py:{world}/objectives.py:broken"])
    assert run.main([*arguments, "--out", str(tmp_path / "nan")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after the bar of the evaluation that met it
    assert last.startswith("run.py: error: ") and "broken" in last and "Human" in last


def test_resume_refuses_prompts_that_have_changed(world, tmp_path, capsys):
    rows = gzip.decompress((world / "prompts.jsonl.gz").read_bytes()).decode().splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_text("".join(rows))
    assert run.main(command(world, prompts=tmp_path / "mine.jsonl", out=tmp_path / "run", rounds=1)) == 0
    (tmp_path / "mine.jsonl").write_text("".join(rows[:-5]))
    capsys.readouterr()
    assert "changed" in refused(capsys, ["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "summary.json").exists()


def test_resume_refuses_fewer_rounds_than_are_done(finished, capsys):
    assert "rounds" in refused(capsys, ["--resume", str(finished), "--rounds", "1"])


def test_a_finished_run_can_be_extended_to_what_a_longer_run_gives(world, tmp_path):
    assert run.main(command(world, out=tmp_path / "long", rounds=3)) == 0
    assert run.main(command(world, out=tmp_path / "short", rounds=2)) == 0
    assert run.main(["--resume", str(tmp_path / "short"), "--rounds", "3"]) == 0
    assert adapter_of(tmp_path / "short") == adapter_of(tmp_path / "long")


def test_a_function_that_raises_is_named_in_one_line(world, capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(prompts, completions, **columns):\n    return {}['score']\n")
    assert run.main(command(world, objectives=[f"py:{tmp_path}/mine.py:mine", "rule:length"], out=tmp_path / "r")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run.py: error: ") and "KeyError" in last and "mine.py:2" in last
    assert not (tmp_path / "r").exists()


def test_an_out_that_cannot_be_made_is_refused(world, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "out" in refused(capsys, command(world, out=tmp_path / "file" / "run"))


def test_an_objective_that_never_varies_is_warned_of(world, capsys, tmp_path):
    (tmp_path / "flat.py").write_text("def flat(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    objectives = [f"py:{tmp_path}/flat.py:flat", "rule:length"]
    assert run.main(command(world, objectives=objectives, out=tmp_path / "flat", rounds=1)) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "flat" in warnings[0]


def test_a_name_that_the_metrics_use_is_refused(world, capsys):
    assert "disagreement" in refused(capsys, command(world, objectives=["disagreement=rule:length", "rule:brevity"]))


def test_text_that_is_not_ascii_survives_any_locale(world, tmp_path):
    row = json.dumps({"chosen": "\n\nHuman: w1 w2 你好\n\nAssistant: w3"}, ensure_ascii=False)
    others = gzip.decompress((world / "prompts.jsonl.gz").read_bytes()).decode()
    (tmp_path / "mine.jsonl").write_text(others + row + "\n", "utf-8")
    arguments = command(world, prompts=tmp_path / "mine.jsonl", out=tmp_path / "run", rounds=1, held_out=38, clients=2)
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, run.__file__, *arguments], env=plain, capture_output=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert "你好" in (tmp_path / "run" / "samples.jsonl").read_text("utf-8")


def test_figures_that_do_not_exist_are_null(world, tmp_path):
    assert run.main(command(world, objectives=["rule:length"], out=tmp_path / "one", rounds=1)) == 0
    line = (tmp_path / "one" / "metrics.jsonl").read_text()
    assert "NaN" not in line and json.loads(line)["cosine"] is None


def test_resume_stands_alone(finished, capsys):
    assert "resume" in refused(capsys, ["--resume", str(finished), "--beta", "1"])


def test_resume_of_something_else_is_refused(tmp_path, capsys):
    assert "resume" in refused(capsys, ["--resume", str(tmp_path)])
