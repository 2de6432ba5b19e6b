"""What a reward model reads, that a batch changes nothing (rewards.py), that it learns what people chose (app/)."""

import json
import random
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import rewards
from app.reward_training import RewardTraining, accuracy, fit, frozen_backbone, main
from rewards import RewardModel, load_objectives, load_reward_model

torch.set_num_threads(1)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "Human:", "Assistant:", *(f"w{i}" for i in range(40))]
POSITIONS = 40
ENCODERS, DECODERS = ["bert", "roberta", "distilbert"], ["gpt2", "llama"]


def make_tokenizer(kind):
    """One token a word. Encoders get [CLS] a [SEP] b [SEP]; decoders nothing, and have no pad token."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind not in ENCODERS:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind == "bert")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=names,
    )


def make_model(kind, labels=1):
    """A random model, its weights large enough for every token to count."""
    torch.manual_seed(0)
    V, sizes = len(WORDS), {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = {"vocab_size": V, "num_labels": labels, "initializer_range": 0.3}
    if kind == "bert":
        config = BertConfig(**common, **sizes, intermediate_size=32, max_position_embeddings=POSITIONS, pad_token_id=0)
        return BertForSequenceClassification(config)
    if kind == "roberta":  # its first position is pad_token_id + 1
        config = RobertaConfig(
            **common, **sizes, intermediate_size=32, max_position_embeddings=POSITIONS + 1, pad_token_id=0
        )
        return RobertaForSequenceClassification(config)
    if kind == "distilbert":
        config = DistilBertConfig(
            **common, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=POSITIONS, pad_token_id=0
        )
        return DistilBertForSequenceClassification(config)
    if kind == "gpt2":
        return GPT2ForSequenceClassification(
            GPT2Config(**common, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS)
        )
    config = LlamaConfig(**common, **sizes, intermediate_size=32, max_position_embeddings=POSITIONS, bos_token_id=None)
    config.eos_token_id = WORDS.index("</s>")
    return LlamaForSequenceClassification(config)


def save(path, kind, labels=1, model=None):
    (model or make_model(kind, labels)).save_pretrained(path)
    make_tokenizer(kind).save_pretrained(path)
    return str(path)


def words(n, seed):
    return " ".join(random.Random(seed).choices(WORDS[7:], k=n))


def human(text):
    return f"\n\nHuman: {text}\n\nAssistant:"


def make_pairs(n, seed=0):
    """People choose what says w1 and reject what says w2, at the end."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        prompt, start = human(" ".join(rng.choices(WORDS[10:], k=4))), " ".join(rng.choices(WORDS[10:], k=3))
        pairs.append((prompt, f"{start} w1", prompt, f"{start} w2"))
    return pairs


def write_pairs(path, pairs):
    rows = [json.dumps({"chosen": f"{a} {b}", "rejected": f"{c} {d}"}) for a, b, c, d in pairs]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


# ---- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
def test_the_score_is_the_models_logit_on_the_model_cards_pair_of_texts(tmp_path, kind):
    (objective,) = load_objectives([f"hf:{save(tmp_path / 'rm', kind)}"])
    prompt = human("w1 w2") + " w3" + human("w4")
    texts = "\n\nHuman: w1 w2\n\nAssistant: w3\n\nHuman: w4 \n\nAssistant:", "w5 w6"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    with torch.no_grad():
        expected = model(**make_tokenizer(kind)(*texts, return_tensors="pt")).logits[0].item()
    assert objective.function(prompts=[prompt], completions=[" w5 w6\n"]) == [pytest.approx(expected, abs=1e-5)]


def test_the_pair_of_texts_is_the_model_cards_to_the_space():
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    reward_model = RewardModel(
        make_model("gpt2"), PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="Z"), 8, 200
    )
    reward_model.max_length = 200
    (encoding,) = reward_model.encode([human("a ") + " b" + human("c  ")], [" d e \n"])
    text = "\n\nHuman: a \n\nAssistant: b\n\nHuman: c \n\nAssistant:d e"
    assert reward_model.tokenizer.decode(encoding["input_ids"]) == text


@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
def test_scores_come_in_order_and_do_not_depend_on_the_batch(tmp_path, kind):
    prompts = [human(words(1 + 7 * i % 30, i)) for i in range(20)]
    completions = [words(1 + 5 * i % 9, 100 + i) + " </s>" * (i % 3) for i in range(20)]
    where = save(tmp_path / "rm", kind)
    alone, some, all_at_once = (load_reward_model(where, batch_size=b)(prompts, completions) for b in (1, 3, 20))
    assert some == pytest.approx(alone, abs=1e-5) and all_at_once == pytest.approx(alone, abs=1e-5)
    assert len({round(x, 4) for x in alone}) > 15  # they do differ


@pytest.mark.parametrize("kind", DECODERS)
def test_where_pad_is_eos_the_score_sits_on_the_last_token_that_is_not_eos(tmp_path, kind):
    reward_model = load_reward_model(save(tmp_path / "rm", kind))
    assert reward_model.tokenizer.pad_token == "</s>" and reward_model.model.config.pad_token_id == 4
    plain, ended, longer = (reward_model.encode([human("w1")], [c])[0] for c in ("w2", "w2 </s>", "w2 </s> </s> w3"))
    assert ended["input_ids"] == [*plain["input_ids"], 4]
    with torch.no_grad():
        logits = reward_model.scores([plain, ended, longer]).tolist()
        states = reward_model.model.base_model(torch.tensor([longer["input_ids"]]))[0]
        by_hand = reward_model.model.score(states)[0, :, 0]
    assert logits[0] == pytest.approx(logits[1], abs=1e-5)
    assert logits[0] == pytest.approx(by_hand[-4].item(), abs=1e-5)
    assert logits[2] == pytest.approx(by_hand[-1].item(), abs=1e-5)


@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
@pytest.mark.parametrize("n", [1, 30, 36, 37, 38, 40, 60])
def test_a_long_input_loses_its_beginning_and_keeps_special_tokens_and_the_responses_end(tmp_path, kind, n):
    reward_model = load_reward_model(save(tmp_path / "rm", kind))
    prompt, response = words(50, 1), words(n, 2)
    (encoding,) = reward_model.encode([human(prompt)], [response])
    ids = encoding["input_ids"]
    assert len(ids) == reward_model.max_length == POSITIONS
    body = [WORDS.index(w) for w in ["Human:", *prompt.split(), "Assistant:"]]
    tail = [WORDS.index(w) for w in response.split()]
    if kind in DECODERS:
        assert ids == (body + tail)[-POSITIONS:]
    else:
        room = POSITIONS - 3
        kept = tail[-room:]
        rest = body[len(body) - (room - len(kept)) :]
        assert ids == [2, *rest, 3, *kept, 3]
        assert kind != "bert" or encoding["token_type_ids"] == [0] * (len(rest) + 2) + [1] * (len(kept) + 1)
    assert torch.isfinite(reward_model.scores([encoding])).all()


def test_with_a_chat_template_the_model_reads_the_conversation(tmp_path):
    where = save(tmp_path / "rm", "llama")
    tokenizer = make_tokenizer("llama")
    tokenizer.bos_token = "[CLS]"
    tokenizer.chat_template = "[CLS] {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(where)
    reward_model = load_reward_model(where)
    by_text, by_messages = (
        reward_model.encode([human("w1") + " w2" + human("w3")], [" w4"], messages)[0]["input_ids"]
        for messages in (None, [[{"role": "user", "content": "w9"}]])
    )
    unknown = 1  # "user", "assistant"
    assert by_text == [2, unknown, 8, unknown, 9, unknown, 10, unknown, 11]
    assert by_messages == [2, unknown, 16, unknown, 11]
    (long,) = reward_model.encode([human(words(60, 1))], ["w5 w6"])
    assert len(long["input_ids"]) == POSITIONS and long["input_ids"][0] == 2 and long["input_ids"][-2:] == [12, 13]


def test_what_is_no_reward_model_is_refused(tmp_path):
    headless = BertModel(make_model("bert").config)
    broken = tmp_path / "broken"
    save(broken, "bert")
    (broken / "model.safetensors").write_bytes(b"no")
    cases = {
        save(tmp_path / "headless", "bert", model=headless): "no trained reward model: it lacks classifier",
        save(tmp_path / "two", "gpt2", labels=2): "has 2 labels",
        str(broken): "cannot be loaded",
        str(tmp_path): "cannot be loaded",
    }
    for where, complaint in cases.items():
        with pytest.raises(ValueError, match=f"objective 'rm': {where} .*{complaint}") as caught:
            load_objectives([f"rm=hf:{where}"])
        assert "\n" not in str(caught.value)


# ---- learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS + DECODERS)
def test_a_frozen_backbone_gives_the_same_scores_and_no_gradient_and_runs_again_afterwards(kind):
    reward_model = RewardModel(make_model(kind), make_tokenizer(kind), batch_size=4)
    chosen = make_pairs(9)
    encodings = reward_model.encode([p[0] for p in chosen], [p[1] for p in chosen])
    full = reward_model.scores(encodings)
    with frozen_backbone(reward_model, encodings) as rows:
        assert torch.allclose(reward_model.scores(rows), full, atol=1e-5)
        reward_model.forward(rows).sum().backward()
    moved = [n for n, p in reward_model.model.named_parameters() if p.grad is not None]
    assert moved and all("pooler" in n for n in moved if n.startswith(reward_model.model.base_model_prefix))
    assert torch.equal(reward_model.scores(encodings), full)


def test_a_head_that_reads_more_than_one_token_cannot_be_trained_alone():
    config = ModernBertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        classifier_pooling="mean", num_labels=1, pad_token_id=0, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    reward_model = RewardModel(ModernBertForSequenceClassification(config), make_tokenizer("roberta"))
    encodings = reward_model.encode([human("w1 w2")], ["w3"])
    before = reward_model.scores(encodings)
    with pytest.raises(ValueError, match="freeze_backbone"), frozen_backbone(reward_model, encodings):
        pass
    assert torch.equal(reward_model.scores(encodings), before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_training_learns_what_people_chose(tmp_path, kind, frozen):
    reward_model = RewardModel(make_model(kind), make_tokenizer(kind))
    before = {n: p.clone() for n, p in reward_model.model.base_model.named_parameters()}
    settings = RewardTraining("", [], str(tmp_path / "out"), freeze_backbone=frozen, epochs=20, lr=1e-2, device="cpu")
    pairs = make_pairs(64)
    encodings = reward_model.encode(
        [p[0] for p in pairs] + [p[2] for p in pairs], [p[1] for p in pairs] + [p[3] for p in pairs]
    )
    if frozen:
        with frozen_backbone(reward_model, encodings) as rows:
            fit(reward_model, rows, settings)
    else:
        fit(reward_model, encodings, settings)
    assert accuracy(reward_model, make_pairs(200, seed=1)) > (0.8 if frozen else 0.95)
    moved = {n for n, p in reward_model.model.base_model.named_parameters() if not torch.equal(p, before[n])}
    assert all("pooler" in n for n in moved) if frozen else len(moved) > 10


def test_one_bradley_terry_step_follows_the_gradient_of_minus_log_sigmoid(tmp_path):
    reward_model = RewardModel(make_model("gpt2"), make_tokenizer("gpt2"))
    pairs = make_pairs(4)
    encodings = reward_model.encode([p[0] for p in pairs] * 2, [p[1] for p in pairs] + [p[3] for p in pairs])
    weight = reward_model.model.score.weight
    start = weight.detach().clone()

    def loss():
        r = reward_model.scores(encodings).double()
        return torch.log1p(torch.exp(r[4:] - r[:4])).mean()  # = -log sigmoid(chosen - rejected)

    numeric = torch.empty(16)
    for k in range(16):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[0, k] += sign * 1e-2
            losses.append(loss())
            with torch.no_grad():
                weight.copy_(start)
        numeric[k] = (losses[0] - losses[1]) / 2e-2
    fit(reward_model, encodings, RewardTraining("", [], str(tmp_path / "o"), epochs=1, lr=1e-4, device="cpu"))
    clear = numeric.abs() > 0.05 * numeric.abs().max()
    assert clear.sum() > 8
    assert torch.equal(
        (weight.detach() - start)[0].sign()[clear], -numeric.sign()[clear]
    )  # Adam's first step: the sign


def test_ties_count_half():
    reward_model = RewardModel(make_model("bert"), make_tokenizer("bert"))
    a, b = human("w1"), human("w2")
    better, worse = sorted(["w3", "w9"], key=lambda c: -reward_model([a], [c])[0])
    assert accuracy(reward_model, [(a, better, a, worse)]) == 1
    assert accuracy(reward_model, [(a, worse, a, better)]) == 0
    assert accuracy(reward_model, [(b, "w3", b, "w3"), (a, better, a, worse)]) == 0.75


# ---- the command line ----------------------------------------------------------------------------------------


def test_the_command_trains_tests_and_saves_what_hf_loads(tmp_path, capsys):
    backbone = save(tmp_path / "backbone", "bert", model=BertModel(make_model("bert").config))
    pairs, test = (
        write_pairs(tmp_path / "a.jsonl", make_pairs(100)),
        write_pairs(tmp_path / "b.jsonl", make_pairs(50, 1)),
    )
    out = tmp_path / "made" / "rm"
    command = ["--backbone", backbone, "--pairs", pairs, "--test-pairs", test, "--out", str(out), "--freeze-backbone"]
    main([*command, "--max-pairs", "64", "--epochs", "20", "--lr", "0.01", "--device", "cpu"])
    printed, record = capsys.readouterr().out, json.loads((out / "reward_training.json").read_text())
    assert printed.count("\n") == 1 and f"test accuracy {record['test_accuracy']:.3f} ± 0.071 on 50 pairs" in printed
    assert record["train_pairs"] == 64 and record["settings"]["epochs"] == 20
    assert record["standard_errors_over_chance"] == pytest.approx((record["test_accuracy"] - 0.5) / 0.5 * 50**0.5)
    reward_model = load_objectives([f"hf:{out}"])[0].function
    assert accuracy(reward_model, make_pairs(50, 1)) == record["test_accuracy"] > 0.8
    assert [p.name for p in out.parent.iterdir()] == ["rm"]
    assert not list(out.glob("*.bin")) and list(out.glob("*.safetensors"))


def test_without_test_pairs_a_tenth_is_held_out_and_equal_seeds_give_equal_models(tmp_path, capsys):
    backbone, pairs = save(tmp_path / "b", "gpt2"), write_pairs(tmp_path / "a.jsonl", make_pairs(40))
    for out in "xy":
        main(["--backbone", backbone, "--pairs", pairs, "--out", str(tmp_path / out), "--device", "cpu"])
    assert capsys.readouterr().out.count("on 4 pairs") == 2
    assert (tmp_path / "x/model.safetensors").read_bytes() == (tmp_path / "y/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "x/reward_training.json").read_text())["train_pairs"] == 36


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--out", "HERE"], "out: .* exists and is not empty; name another directory"),
        (["--pairs", "HERE/no.jsonl"], "no.jsonl: no such file"),
        (["--pairs", "HERE/bad.jsonl"], r"bad.jsonl:1: no text in 'rejected'"),
        (["--backbone", "HERE/none"], "none cannot be loaded"),
        (["--lr", "0"], "lr: 0.0"),
        (["--epochs", "0"], "epochs: 0"),
        (["--max-length", "3"], "max_length: 3"),
        (["--freeze"], "unknown option --freeze"),
        (["--device", "cuda:9"], "device"),
    ],
)
def test_bad_input_to_the_command_ends_in_one_line_and_leaves_files_alone(tmp_path, capsys, change, complaint):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"chosen": human("w1")}) + "\n")
    backbone, pairs = save(tmp_path / "b", "bert"), write_pairs(tmp_path / "a.jsonl", make_pairs(20))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    command = ["--backbone", backbone, "--pairs", pairs, "--out", str(tmp_path / "out"), "--device", "cpu"]
    try:
        assert main([*command, *(word.replace("HERE", str(tmp_path)) for word in change)]) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    message = capsys.readouterr().err
    assert "rewards.py: error: " in message
    assert re.search(complaint, message.partition("rewards.py: error: ")[2])
    assert message.partition("error: ")[2].count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_a_training_that_diverges_is_refused_and_saves_nothing(tmp_path, capsys):
    backbone, pairs = save(tmp_path / "b", "gpt2"), write_pairs(tmp_path / "a.jsonl", make_pairs(20))
    command = ["--backbone", backbone, "--pairs", pairs, "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--lr", "1e30", "--epochs", "3"]) == 2
    assert re.search(r"error: lr: the loss is \w+ in step \d+; lower lr", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_found_before_any_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--backbone", "nowhere", "--pairs", "nowhere", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "error: out: " in capsys.readouterr().err


def test_the_command_shows_its_own_bars_and_none_of_the_librarys_lines(tmp_path, capfd):
    backbone = save(tmp_path / "b", "bert", model=BertModel(make_model("bert").config))
    pairs = write_pairs(tmp_path / "a.jsonl", make_pairs(20))
    capfd.readouterr()
    main(["--backbone", backbone, "--pairs", pairs, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert {line.split(":")[0] for line in re.split(r"[\r\n]+", capfd.readouterr().err) if line} == {
        "training",
        "testing",
    }


@pytest.mark.parametrize("kind", DECODERS)
def test_a_config_that_pads_with_another_token_than_the_tokenizer_changes_no_score(kind):
    model, tokenizer = make_model(kind), make_tokenizer(kind)
    tokenizer.pad_token = "[PAD]"
    model.config.pad_token_id = WORDS.index("w30")
    reader = RewardModel(model, tokenizer)
    short, long = "\n\nHuman: w1\n\nAssistant:", "\n\nHuman: w1 w2 w3 w4 w5 w6\n\nAssistant:"
    alone = reader(prompts=[short], completions=["w7 w8"])[0]
    together = reader(prompts=[short, long], completions=["w7 w8", "w9"])[0]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "status", "first"),
    [
        (["--help"], 0, "usage: rewards.py "),
        (
            ["--backbone", "x", "--pairs", "y", "--out", "z", "--epoch", "3"],
            2,
            "rewards.py: error: unknown option --ep",
        ),
    ],
)
def test_rewards_py_is_the_command_and_a_bad_flag_gets_one_line(arguments, status, first):
    done = subprocess.run([sys.executable, rewards.__file__, *arguments], capture_output=True, text=True)
    shown = done.stdout + done.stderr
    assert done.returncode == status and shown.startswith(first)
    assert status == 0 or shown.count("\n") == 1
