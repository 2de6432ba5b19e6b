"""LoRA by hand: an adapter that starts at nothing, can be switched off and merged exactly, and that PEFT reads."""

import json

import pytest
import safetensors.torch
import torch
from conftest import make_model

from app import peft_files
from lora import inject

IDS = torch.tensor([[5, 9, 13, 20, 7, 33]])
ALL_OF_LLAMA = [*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def moved(model, rank=4, scale=2.0):
    """An adapter on `model`, away from zero."""
    adapter = inject(model, rank, scale, ["all-linear"])
    theta = adapter.vector()
    adapter.assign(theta + 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1)))
    return adapter


def base_weights(adapter) -> list[torch.Tensor]:
    return [layer.base.weight.clone() for layer in adapter.layers.values()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_or_switched_off_it_is_the_base_model_bit_for_bit_even_after_an_error(kind, dtype):
    model = make_model(kind).to(dtype)
    before = logits(model)
    adapter = inject(model, 4, 2.0, ["all-linear"])
    assert torch.equal(logits(model), before)
    adapter.assign(adapter.vector() + 0.05)
    on = logits(model)
    assert (on - before).abs().max() > 0.1
    with pytest.raises(KeyError), adapter.disabled():
        assert torch.equal(logits(model), before)
        raise KeyError
    assert torch.equal(logits(model), on)


def test_the_layer_computes_w_x_plus_scale_times_b_a_x(kind):
    adapter = moved(make_model(kind), rank=2, scale=3.0)
    for layer in adapter.layers.values():
        W, A, B = (p.detach().double() for p in (layer.base.weight, layer.A, layer.B))
        W = W.T if kind == "gpt2" else W
        bias = 0.0 if layer.base.bias is None else layer.base.bias
        x = torch.randn(3, W.shape[1])
        assert (layer(x) - (x.double() @ (W + 3.0 * B @ A).T + bias)).abs().max() < 1e-4


def test_merged_it_computes_the_same_and_every_base_weight_comes_back_bit_for_bit(kind):
    model = make_model(kind)
    adapter = moved(model)
    beside, before = logits(model), base_weights(adapter)
    with pytest.raises(KeyError), adapter.merged():
        assert not same(base_weights(adapter), before)
        assert (logits(model) - beside).abs().max() < 1e-4
        raise KeyError
    assert same(base_weights(adapter), before)
    assert torch.equal(logits(model), beside)


@pytest.mark.parametrize("why", ["bfloat16", "weight", "layer"])
def test_a_merge_that_would_not_be_exact_is_left_out(why):
    model = make_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    if why == "bfloat16":
        model.to(torch.bfloat16)
    elif why == "layer":
        second.up_proj = first.up_proj
    else:
        second.up_proj.weight = first.up_proj.weight
    adapter = moved(model)
    beside, before = logits(model), base_weights(adapter)
    with adapter.merged():
        assert same(base_weights(adapter), before)
        assert torch.equal(logits(model), beside)


@pytest.mark.parametrize(
    ("layers", "targets", "parts"),
    [
        ("model.layers", ["all-linear"], ALL_OF_LLAMA),
        ("model.layers", ["mlp.up_proj", "q_proj"], ["self_attn.q_proj", "mlp.up_proj"]),
        ("transformer.h", ["all-linear"], ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("transformer.h", ["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
    ],
)
def test_exactly_the_factors_of_the_targets_are_trainable(layers, targets, parts):
    model = make_model("llama" if layers == "model.layers" else "gpt2")
    inject(model, 4, 2.0, targets)
    expected = [f"{layers}.{i}.{part}.{factor}" for i in range(2) for part in parts for factor in "AB"]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == expected


def test_a_target_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="lora_targets.*'proj'.*q_proj"):
        inject(make_model("llama"), 4, 2.0, ["q_proj", "proj"])


def test_the_vector_holds_the_parameters_one_behind_the_other():
    adapter = moved(make_model("llama"))
    theta = torch.randn(adapter.size)
    adapter.assign(theta)
    assert torch.equal(adapter.vector(), theta)
    assert same(adapter.split(theta), [factor for layer in adapter.layers.values() for factor in (layer.A, layer.B)])


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another():
    a, b, c = (inject(make_model("llama"), 4, 2.0, ["all-linear"], seed).vector() for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_over_16_bit_weights_gradient_and_step_are_taken_in_the_float32_parameters_and_reach_the_next_pass():
    slopes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("llama").to(dtype)
        adapter = moved(model)
        loss = model(input_ids=IDS).logits.float().logsumexp(-1).sum()
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapter.parameters)]))
    assert slopes[1].dtype == torch.float32
    assert torch.cosine_similarity(*slopes, dim=0) > 0.95
    before = logits(model)
    for parameter, slope in zip(adapter.parameters, adapter.split(slopes[1]), strict=True):
        parameter.grad = slope
    torch.optim.Adam(adapter.parameters, lr=0.05).step()
    assert (logits(model) - before).abs().max() > 0.1


@pytest.mark.parametrize("change", ["shape", "missing", "not finite"])
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_copied(change):
    adapter = moved(make_model("llama"))
    before = adapter.vector()
    tensors = {name: tensor.detach() + 1.0 for name, tensor in adapter.tensors().items()}
    last = list(tensors)[-1]
    tensors[last] = tensors[last][:1] if change == "shape" else tensors[last] * torch.inf
    if change == "missing":
        del tensors[last]
    with pytest.raises(ValueError, match=f"^adapter: .*{last}.*; .*$"):
        adapter.load_tensors(tensors)
    assert torch.equal(adapter.vector(), before)


def assert_alike(peft_model, model, base):
    """The same logits, in float32 to rounding and in 16 bits to a few of their steps, and not the base model's."""
    scale = (logits(model) - base).norm()
    assert (logits(peft_model) - logits(model)).norm() <= (1e-5 if model.dtype == torch.float32 else 0.05) * scale
    assert scale > 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_our_files_and_gives_the_same_logits(kind, dtype, tmp_path):
    peft = pytest.importorskip("peft", reason="parity needs peft (requirements-dev.txt)")
    model = make_model(kind).to(dtype)
    base = logits(model)
    peft_files.save(moved(model), tmp_path, "base")
    peft_model = peft.PeftModel.from_pretrained(make_model(kind).to(dtype), tmp_path).eval()
    assert_alike(peft_model, model, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_pefts_files_and_give_the_same_logits(kind, rslora, dtype, tmp_path):
    peft = pytest.importorskip("peft", reason="parity needs peft (requirements-dev.txt)")
    targets = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"]}[kind]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, fan_in_fan_out=kind == "gpt2",
        use_rslora=rslora,
    )  # fmt: skip
    peft_model = peft.get_peft_model(make_model(kind).to(dtype), config).eval()
    peft_model.save_pretrained(tmp_path)
    model = make_model(kind).to(dtype)
    base = logits(model)
    peft_files.load(inject(model, 4, 8 / 2 if rslora else 8 / 4, targets), tmp_path)
    assert_alike(peft_model, model, base)


def saved(directory, **settings):
    """An adapter, and its files in `directory` with some of PEFT's settings changed."""
    adapter = moved(make_model("llama"))
    peft_files.save(adapter, directory, "base")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return adapter


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"), ("bias", "all"), ("use_dora", True), ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}), ("alpha_pattern", {"q_proj": 8}), ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [3]), ("arrow_config", {"top_k": 3}),
        *[("init_lora_weights", start) for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva")],
    ],
)  # fmt: skip
def test_a_setting_that_changes_the_function_is_refused_by_name(key, value, tmp_path):
    adapter = saved(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"^adapter: .*{key}.*; .*$"):
        peft_files.load(adapter, tmp_path)


@pytest.mark.parametrize(("rank", "scale"), [(8, 2.0), (4, 2.25)])
def test_another_rank_or_scale_is_refused(rank, scale, tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="set lora_rank and lora_alpha"):
        peft_files.load(inject(make_model("llama"), rank, scale, ["all-linear"]), tmp_path)


def test_an_adapter_with_an_embedding_or_in_a_bin_file_is_refused_by_that(tmp_path):
    adapter = saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    extra = {"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}
    safetensors.torch.save_file(safetensors.torch.load_file(file) | extra, file)
    with pytest.raises(ValueError, match="adapts other layers .*embed_tokens"):
        peft_files.load(adapter, tmp_path)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="safetensors.*pickle"):
        peft_files.load(adapter, tmp_path)
