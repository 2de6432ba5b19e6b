"""The command line: presets, flags, what is refused and by which name, and the help."""

import json
import re
from dataclasses import fields, replace

import pytest
from test_run import refused

import methods
import run
from app.options import PRESETS, parse
from methods import METHODS, PARTS
from settings import Config


def parsed(text) -> Config:
    return parse(text.split())[0]


def test_a_flag_overrides_its_preset_and_a_model_of_the_user_s_has_the_paper_s_settings():
    assert (parsed("--preset tinyllama").lora_rank, parsed("--preset tinyllama --lora_rank 4").lora_rank) == (16, 4)
    assert parsed("").preset == "tiny" and parsed("--model dir --prompts x").preset == "paper"
    assert (parsed("--diagnostics").diagnostics, parsed("--no-diagnostics").diagnostics) == (True, False)


def test_every_preset_is_a_valid_configuration():
    needs = {"paper": "--model d --prompts x --objectives rule:length", "gsm8k": "--prompts x"}
    for config in (parsed(f"--preset {preset} {needs.get(preset, '')}") for preset in PRESETS):
        assert config.method == methods.PREDICTOR or methods.check(config) is None


def test_settings_survive_their_file(tmp_path):
    config = parsed("--beta 0.3 --preference 1 3 --lora_targets q_proj v_proj")
    (tmp_path / "config.json").write_text(json.dumps(vars(config)))
    assert parse(["--resume", str(tmp_path)])[0] == config
    assert parse(["--resume", str(tmp_path), "--micro_batch_size", "2"])[0] == replace(config, micro_batch_size=2)


REFUSED = {  # flags, and what the one line names
    "--pref 1 2": "--pref",  # no abbreviations
    "--beta much": "--beta.*much",
    "--beta nan": "beta",
    "--lora_rank 0": "lora_rank: 0",
    "--device gpu": "device: 'gpu'.*cpu",
    "--method magic": "method: 'magic'.*firm",
    "--method soups": "method: soups.*--sweep",
    "--preset huge": "preset: 'huge'.*tiny",
    "--advantages magic": "advantages: 'magic'.*critic",
    "--method fedcmoo --weights fixed": "weights: fedcmoo",
    "--preference 1 2 3": "preference: 3 numbers for 2 objectives",
    "--method mgda --preference 1 2": "preference: mgda does not read it",
    "--method linear --beta 1": "beta: linear does not read it",
    "--advantages group --gae_lambda 0.9": "gae_lambda: firm",
    "--opinions x": "opinions: firm does not read it",
    "--split iid --dirichlet_alpha 1": "dirichlet_alpha",
    "--preset pluralllm-tiny --lora_rank 2": "lora_rank: pluralllm does not read it",
    "--advantages group --group_size 3": "group_size: 3 does not divide batch_size, 16",
    "--advantages group --group_size 1": "group_size: a group of 1",
    "--clients_per_round 9": "clients_per_round: 9 is more than clients, 8",
    "--severity 0.5": "severity",
    "--method fsmgda --personal_rounds 1": "personal_rounds: fsmgda",
    "--model dir --objectives rule:length": "prompts",
    "--model dir --prompts x": "objectives",
    "--objectives " + " ".join(f"x{i}=rule:length" for i in range(9)): "objectives: 9 are too many",
    "--resume x --beta 1": "resume.*but for device",
    "--resume nowhere": "nowhere/config.json",
    "--model reasoning --beta 1": "preset: --model reasoning goes with a preset, such as fedmoa-tiny",
    "--compare mgda linear --beta 1": "beta: mgda or linear does not read it",
    "--compare firm --method linear": "compare.*--method",
    "--sweep 0.5 --preference 1 1": "sweep.*--preference",
    "--sweep 0.5 --preset pluralllm-tiny": "method: pluralllm.*--sweep",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_flags_are_refused_in_one_line_that_names_them(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(REFUSED[flags], refused(capsys, flags.split()))
    assert not list(tmp_path.rglob("*.json"))


def test_help_lists_every_setting_and_every_choice(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    text = "".join(capsys.readouterr().out.split())  # wherever its lines break
    assert stop.value.code == 0
    assert all(f"--{f.name}" in text and f.metadata["help"].replace(" ", "") in text for f in fields(Config))
    choices = [*METHODS.values(), *(part for _, parts in PARTS.values() for part in parts.values())]
    assert all(f"{choice.name}:{choice.help}".replace(" ", "") in text for choice in choices)
    assert all(f"--{name}" in text for name in ("resume", "sweep", "compare")) and "(default:0.01)" in text
