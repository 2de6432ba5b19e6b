"""app/loading.py: checkpoints are loaded whole, or refused in one line."""

import pytest
import safetensors.torch
from conftest import make_model, make_tokenizer

from app.loading import fingerprint, pretrained

REWARD, MISSING = "AutoModelForSequenceClassification", "transformer.h.1.ln_1.weight"


def test_dropout_is_zero_and_only_a_new_head_may_be_missing_and_no_adapter_be_there(tmp_path):
    for part in (make_model("gpt2"), make_tokenizer()):
        part.save_pretrained(tmp_path)
    name, file, before = str(tmp_path), tmp_path / "model.safetensors", fingerprint(tmp_path)
    model, _ = pretrained("AutoModelForCausalLM", name)
    assert {m.p for m in model.modules() if hasattr(m, "p")} == {0.0}  # 0.1 in the config
    assert pretrained(REWARD, name, new_head=True)[0].config.num_labels == 1
    with pytest.raises(ValueError, match=f"{name} cannot be loaded: it lacks score.weight"):
        pretrained(REWARD, name)

    assert fingerprint(tmp_path) == before
    weights = safetensors.torch.load_file(file)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].flip(0)  # rows in another order
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    assert fingerprint(tmp_path) != before
    del weights[MISSING]
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"it lacks {MISSING}"):
        pretrained(REWARD, name, new_head=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json: merge"):
        pretrained("AutoModelForCausalLM", name)


def test_a_chat_template_prints_the_same_date_every_day():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == "01 Jan 2025"
