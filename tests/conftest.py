"""Small real checkpoints for the tests: a Llama with rotary positions and a GPT-2 with learned ones."""

import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from settings import ModelSettings

torch.set_num_threads(1)
WORDS = [f"w{i}" for i in range(46)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """50 words, split at spaces; ids 0 to 3 are pad, bos, eos, unk."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(kind: str, seed: int = 0):
    """A random model of 2 layers; its weights are large enough that predictions are far from uniform."""
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, **special))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, **special,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def make_policy(
    kind: str = "llama", noise: float = 0.1, temperature: float = 1.0, rank: int = 4, device: str = "cpu",
    dtype: torch.dtype = torch.float32, max_new_tokens: int = 128,
):  # fmt: skip
    """A policy whose adapter has been moved away from zero, so that it does something; the same on every device."""
    from rollout import Policy  # here, so that tests of what lies below need no policy

    config = ModelSettings(temperature=temperature, max_new_tokens=max_new_tokens, lora_rank=rank)
    policy = Policy(make_model(kind).to(device, dtype), make_tokenizer(), config)
    theta = policy.adapter.vector()
    step = noise * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1))
    policy.adapter.assign(theta + step.to(device))
    return policy


@pytest.fixture(autouse=True)
def sketched(request, monkeypatch) -> None:
    """Pictures are made ready but not drawn, which would be most of a small run's time. They are drawn in test_plots.py
    and, since those come before this, by fixtures of a whole module.
    """
    if request.module.__name__ != "test_plots":
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"\x89PNG"))


@pytest.fixture(params=["llama", "gpt2"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def policy(kind):
    return make_policy(kind)
