"""What a reward model reads, that transformers reads the same, and that it learns what people chose."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import rewards
from app.objectives import check_prompts, load_objectives
from app.reward_training import RewardTraining, encode_pairs, main
from data import Prompt, to_messages
from rewards import RewardModel, accuracy, fit

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "Human:", "Assistant:", *(f"w{i}" for i in range(40))]
KINDS = ["llama", "chat llama", "gpt2", "bert"]
TEMPLATE = "[CLS] {% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
REFUSES_W2 = "{% if messages[0].content == 'w2' %}{{ raise_exception('no w2') }}{% endif %}x"


def make_tokenizer(kind, template=None):
    """One token a word. BERT's texts get [CLS] and [SEP], Llama's get [CLS] as BOS, GPT-2's nothing."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = {"bert": "[CLS] $A [SEP]", "gpt2": "$A"}.get(kind, "[CLS] $A")
    tokenizer.post_processor = processors.TemplateProcessing(single, None, [("[CLS]", 2), ("[SEP]", 3)])
    first = {"cls_token" if kind == "bert" else "bos_token": "[CLS]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>", **first)
    tokenizer.chat_template = TEMPLATE if kind == "chat llama" else template
    return tokenizer


def make_model(kind, labels=1, pad=0):
    """A random model, its weights large enough for every token to count."""
    torch.manual_seed(0)
    common = {"vocab_size": len(WORDS), "num_labels": labels, "initializer_range": 0.3, "pad_token_id": pad}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    form = {"gpt2": GPT2Config, "bert": BertConfig}.get(kind, LlamaConfig)
    return Classifier.from_config(form(**common, **sizes, max_position_embeddings=40)).eval()


def save(path, kind, template=None, **changes):
    make_model(kind, **changes).save_pretrained(path)
    make_tokenizer(kind, template).save_pretrained(path)
    return str(path)


def words(n, seed):
    return " ".join(random.Random(seed).choices(WORDS[7:], k=n))


def human(text):
    return f"\n\nHuman: {text}\n\nAssistant:"


def encode(reward_model, prompt, reply):
    return reward_model.encode([prompt], [reply], [to_messages(prompt)])[0]


def make_pairs(n, seed=0):
    """People choose what says w1 and reject what says w2, at the end."""
    texts = [f"{human(words(4, f'{seed} {i}'))} {words(3, f'{seed} {i} reply')}" for i in range(n)]
    return [(f"pairs:{i}", {"chosen": f"{text} w1", "rejected": f"{text} w2"}) for i, text in enumerate(texts)]


def write_pairs(path, pairs):
    path.write_text("".join(json.dumps(row) + "\n" for _, row in pairs))
    return str(path)


def read_by_transformers(where, prompt, reply):
    """The logit of one text as transformers alone gives it for a saved checkpoint."""
    model, tokenizer = Classifier.from_pretrained(where).eval(), AutoTokenizer.from_pretrained(where)
    text = f"{prompt.removesuffix(rewards.REPLY)} \n\nAssistant: {reply}"
    if tokenizer.chat_template:
        chat = [*to_messages(prompt), {"role": "assistant", "content": reply}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.item()


@pytest.mark.parametrize("pad", [0, 9], ids=lambda pad: f"pad{pad}")
@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_what_transformers_gives_for_the_one_text_alone_or_in_a_batch(tmp_path, kind, pad):
    (objective,) = load_objectives([f"hf:{save(tmp_path / 'rm', kind, pad=pad)}"])
    prompts = [human("w1 w2") + " w3" + human("w4"), *(human(words(1 + 3 * i % 20, i)) for i in range(40))]
    replies = [" w5 w6\n", *(words(1 + 5 * i % 9, 100 + i) + " </s>" * (i % 3) for i in range(40))]
    scores = objective.function(prompts=prompts, completions=replies, messages=[*map(to_messages, prompts)], tags=None)
    expected = [read_by_transformers(tmp_path / "rm", p, r.strip()) for p, r in zip(prompts, replies, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in scores}) > 35  # they do differ


def test_the_text_without_a_chat_template_to_the_space():
    reward_model = RewardModel(make_model("gpt2"), make_tokenizer("gpt2"))
    reward_model.tokenizer = Mock(chat_template=None, return_value={"input_ids": [[1]]})
    encode(reward_model, human("a ") + " b" + human("c  "), " d e \n")
    (texts,) = reward_model.tokenizer.call_args.args
    assert texts == ["\n\nHuman: a \n\nAssistant: b\n\nHuman: c \n\nAssistant: d e"]


def test_only_a_checkpoint_without_a_pad_token_gets_one():
    for pad, own, expected in [(9, None, 9), (0, "</s>", 0), (None, "w1", WORDS.index("w1")), (None, None, 4)]:
        tokenizer = make_tokenizer("llama")
        tokenizer.pad_token = own
        assert RewardModel(make_model("llama", pad=pad), tokenizer).model.config.pad_token_id == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [30, 38, 60])
def test_a_long_text_loses_its_beginning_and_keeps_special_tokens_and_the_end(kind, n):
    reward_model, reply = RewardModel(make_model(kind), make_tokenizer(kind)), words(n, 2)
    ids = encode(reward_model, human(words(50, 1)), reply)
    first = [] if kind == "gpt2" else [2]
    last = {"bert": [3], "chat llama": [4]}.get(kind, [])
    end = [WORDS.index(word) for word in reply.split()][-(40 - len(first + last)) :]
    assert len(ids) == 40 and ids[: len(first)] == first and ids[-len(end + last) :] == end + last
    assert torch.isfinite(reward_model.scores([ids])).all()


def test_several_labels_and_prompts_that_a_chat_template_refuses_are_found_before_a_run(tmp_path):
    with pytest.raises(ValueError, match="has 2 labels"):
        load_objectives([f"hf:{save(tmp_path / 'two', 'gpt2', labels=2)}"])
    objectives = load_objectives([f"hf:{save(tmp_path / 'rm', 'llama', REFUSES_W2)}"])
    prompts = [Prompt(human(w), to_messages(human(w)), (), "", {"answer": None}) for w in ("w1", "w2")]
    check_prompts(objectives[0], prompts[:1])
    with pytest.raises(ValueError, match="prompts: rm cannot score '.*Human: w2.*no w2"):
        check_prompts(objectives[0], prompts)
    with pytest.raises(ValueError, match="prompts: accuracy cannot score '.*Human: w1"):
        check_prompts(*load_objectives(["py:worlds/gsm8k.py:accuracy"]), prompts)


def test_one_step_goes_against_the_gradient_of_minus_log_sigmoid():
    reward_model = RewardModel(make_model("gpt2"), make_tokenizer("gpt2"))
    rows, weight = encode_pairs(reward_model, make_pairs(4)), reward_model.model.score.weight
    r = reward_model.forward(rows).double()
    loss = torch.log1p(torch.exp(r[4:] - r[:4])).mean()  # = -log sigmoid(chosen - rejected)
    (gradient,), start = torch.autograd.grad(loss, weight)[0], weight.detach().clone()
    fit(reward_model, rows, RewardTraining("", [], "", epochs=1, lr=1e-4))
    clear = gradient.abs() > 1e-3 * gradient.abs().max()
    assert clear.sum() > 8  # Adam's first step is minus the gradient's sign
    assert torch.equal((weight.detach() - start)[0].sign()[clear], -gradient.sign()[clear])


def test_a_test_file_without_pairs_is_refused(tmp_path, capsys):
    pairs, none = write_pairs(tmp_path / "a", make_pairs(20)), write_pairs(tmp_path / "b", [])
    with pytest.raises(SystemExit):
        main(["--backbone", "x", "--pairs", pairs, "--test_pairs", none, "--out", str(tmp_path / "rm")])
    assert "pairs: 20 to train on and 0 to test on" in capsys.readouterr().err


def test_accuracy_counts_ties_half():
    constant = SimpleNamespace(scores=lambda rows: torch.tensor([1.0, 2.0, 5.0, 5.0, 0.0, 5.0]))
    assert accuracy(constant, []) == 0.5  # right, wrong and a tie


def test_a_row_that_cannot_be_used_is_named_before_any_training(tmp_path):
    pairs = write_pairs(tmp_path / "a", make_pairs(20))
    test = write_pairs(tmp_path / "b", [("", {"chosen": human(w) + " w3", "rejected": human(w)}) for w in ("w1", "w2")])
    command = ["--backbone", save(tmp_path / "base", "llama", REFUSES_W2), "--pairs", pairs, "--test_pairs", test]
    command = [sys.executable, rewards.__file__, *command, "--out", str(tmp_path / "rm"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"rewards.py: error: {test}:2: TemplateError in 'chosen': no w2" in done.stderr
    assert "training" not in done.stderr and not (tmp_path / "rm").exists()


@pytest.mark.parametrize("frozen", [False, True], ids=["whole", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_learns_what_people_chose_and_saves_what_transformers_reads_alike(tmp_path, capsys, kind, frozen):
    pairs, test = write_pairs(tmp_path / "a", make_pairs(64)), write_pairs(tmp_path / "b", make_pairs(200, 1))
    command = ["--backbone", save(tmp_path / "base", kind, pad=None), "--pairs", pairs, "--test_pairs", test]
    command += ["--epochs", "20", "--lr", "0.01", "--device", "cpu"] + ["--freeze_backbone"] * frozen
    outs = [tmp_path / "new" / "rm", tmp_path / "again"]
    for out in outs:
        main([*command, "--out", str(out)])
    record = json.loads((outs[0] / "reward_training.json").read_text())
    assert f"{record['accuracy']:.3f} ± 0.035 on 200 pairs" in capsys.readouterr().out
    assert record["accuracy"] > (0.8 if frozen else 0.95) and record["trained_on"] == 64
    assert len({(out / "model.safetensors").read_bytes() for out in outs}) == 1
    before, after = (
        Classifier.from_pretrained(where).base_model.state_dict() for where in (tmp_path / "base", outs[0])
    )
    kept = [torch.equal(before[name], after[name]) for name in before if "pooler" not in name]
    assert all(kept) if frozen else not any(kept)
    (objective,) = load_objectives([f"hf:{outs[0]}"])
    for prompt, reply in [(human("w5 w6"), "w7 w1"), (human("w8"), "w9 w9 w2"), (human("w1"), "w3 </s>")]:
        (score,) = objective.function(prompts=[prompt], completions=[reply], messages=[to_messages(prompt)])
        assert score == pytest.approx(read_by_transformers(outs[0], prompt, reply), abs=1e-5)
