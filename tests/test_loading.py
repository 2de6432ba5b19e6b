"""app/loading.py: checkpoints are loaded whole, or refused in one line that says what is wrong with them."""

import json

import pytest
import safetensors.torch
import torch
from conftest import make_model, make_tokenizer
from huggingface_hub import constants

from app.session import Session
from rewards import load_reward_model
from rollout import load_model
from settings import parse
from worlds.opinions import Encoder


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint of a Llama with two layers."""
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change_weights(checkpoint, change) -> None:
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def change_config(checkpoint, **settings) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | settings))


def refusal(checkpoint) -> str:
    with pytest.raises(ValueError, match=str(checkpoint)) as caught:
        load_model(str(checkpoint), "float32", "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_with_more_layers_than_its_config_says_is_refused_by_the_first_of_their_weights(checkpoint):
    change_config(checkpoint, num_hidden_layers=1)
    assert "holds, beyond what its config says, model.layers.1.input_layernorm.weight" in refusal(checkpoint)


def test_weights_that_are_not_finite_are_refused_by_name(checkpoint):
    change_weights(checkpoint, lambda weights: weights["model.layers.0.mlp.up_proj.weight"][3, 4].fill_(torch.nan))
    assert "model.layers.0.mlp.up_proj.weight is not finite" in refusal(checkpoint)


def test_buffers_of_older_checkpoints_do_no_harm(checkpoint):
    before, ids = load_model(str(checkpoint), "float32", "cpu")[0], torch.tensor([[5, 6, 7]])
    change_weights(checkpoint, lambda weights: weights.update({"model.layers.0.rotary_emb.inv_freq": torch.ones(4)}))
    after = load_model(str(checkpoint), "float32", "cpu")[0]
    assert torch.equal(before(ids).logits, after(ids).logits)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"model_type": "llama", "hidden_size": "wide"}', '"llama"'])
def test_a_config_that_is_none_is_refused(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    assert "cannot be loaded" in refusal(checkpoint)


def test_a_pickle_is_refused_where_it_holds_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"weights": object}, checkpoint / "pytorch_model.bin")
    assert "cannot be loaded" in refusal(checkpoint)


def test_a_reward_model_with_more_layers_than_its_config_says_is_refused(checkpoint):
    change_config(checkpoint, num_hidden_layers=1)
    with pytest.raises(ValueError, match="no trained reward model: it lacks score.weight"):
        load_reward_model(str(checkpoint))
    change_config(checkpoint, id2label={"0": "reward"})
    change_weights(checkpoint, lambda weights: weights.update({"score.weight": torch.ones(1, 32)}))
    with pytest.raises(ValueError, match="beyond what its config says, "):
        load_reward_model(str(checkpoint))


def test_what_gets_a_new_head_or_none_must_have_its_body(checkpoint):
    load_reward_model(str(checkpoint), new_head=True)
    Encoder(str(checkpoint))
    change_weights(checkpoint, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    for load in (lambda: load_reward_model(str(checkpoint), new_head=True), lambda: Encoder(str(checkpoint))):
        with pytest.raises(ValueError, match=r"it lacks .*layers\.1\.mlp\.up_proj"):
            load()


def test_a_tokenizer_that_is_not_the_models_is_refused_before_it_asks_for_words_that_are_not_there(checkpoint):
    change_config(checkpoint, vocab_size=20)
    change_weights(checkpoint, lambda weights: weights.update({k: w[:20] for k, w in weights.items() if len(w) == 50}))
    reward_model = load_reward_model(str(checkpoint), new_head=True)
    with pytest.raises(ValueError, match="its tokenizer made the id 49, and it embeds 20"):
        reward_model(["\n\nHuman: w45\n\nAssistant:"], [" w1"])
    rows = checkpoint / "prompts.jsonl"
    rows.write_text('{"chosen": "\\n\\nHuman: w45\\n\\nAssistant: w1"}\n' * 20)
    asked = (
        f"--model {checkpoint} --prompts {rows} --objectives rule:length --held_out 4 --clients 2 --max_new_tokens 8"
    )
    with pytest.raises(ValueError, match="model: its tokenizer made the id 49, and it embeds 20"):
        Session(parse(asked.split())[0], progress=False)


def test_a_hub_that_cannot_be_reached_is_asked_once_and_its_cache_alone_after_that(monkeypatch, capsys):
    asked = []

    def unreachable(address, timeout):
        asked.append((address, timeout))
        raise OSError("no network in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    for _ in range(2):
        with pytest.raises(ValueError, match="nobody/none cannot be loaded or downloaded"):
            load_model("nobody/none", "float32", "cpu")
    assert asked == [(("huggingface.co", 443), 5)]
    assert "nobody/none is not here; looking for it on https://huggingface.co" in capsys.readouterr().err
