"""LoRA by hand: an adapter that starts at nothing, can be switched off and merged exactly, and that PEFT reads."""

import json

import pytest
import safetensors.torch
import torch
from conftest import make_model, make_policy

from lora import LoRAConfig, inject

IDS = torch.tensor([[5, 9, 13, 20, 7, 33]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def moved(model, **settings):
    """An adapter on `model`, away from zero."""
    adapter = inject(model, LoRAConfig(**{"lora_rank": 4, **settings}))
    theta = adapter.vector()
    adapter.assign(theta + 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1)))
    return adapter


def test_a_fresh_adapter_changes_nothing(kind):
    model = make_model(kind)
    before = logits(model)
    inject(model, LoRAConfig(lora_rank=4))
    assert torch.equal(logits(model), before)


def test_a_moved_adapter_changes_the_logits(kind):
    model = make_model(kind)
    before = logits(model)
    moved(model)
    assert (logits(model) - before).abs().max() > 0.1


def test_switched_off_it_is_the_base_model_bit_for_bit(kind):
    model = make_model(kind)
    before = logits(model)
    adapter = moved(model)
    with adapter.disabled():
        assert torch.equal(logits(model), before)


def test_switching_off_ends_with_the_block_even_on_an_error():
    model = make_model("llama")
    adapter = moved(model)
    on = logits(model)
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert torch.equal(logits(model), on)


def test_merged_it_computes_the_same(kind):
    model = make_model(kind)
    adapter = moved(model)
    beside = logits(model)
    with adapter.merged():
        merged = logits(model)
    assert (merged - beside).abs().max() < 1e-4
    assert not torch.equal(merged, beside)  # it really went another way


def test_merging_restores_every_base_weight_bit_for_bit(kind):
    model = make_model(kind)
    adapter = moved(model)
    before = {name: layer.base.weight.clone() for name, layer in adapter.layers.items()}
    with pytest.raises(KeyError), adapter.merged():
        assert not torch.equal(next(iter(adapter.layers.values())).base.weight, next(iter(before.values())))
        raise KeyError
    assert all(torch.equal(layer.base.weight, before[name]) for name, layer in adapter.layers.items())


def test_the_update_is_scale_times_b_a():
    model = make_model("llama")
    adapter = moved(model, lora_targets=["q_proj"], lora_rank=2, lora_alpha=6.0)
    layer = adapter.layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 32)
    by_hand = x @ layer.base.weight.T + 6.0 / 2 * x @ layer.A.T @ layer.B.T
    assert (layer(x) - by_hand).abs().max() < 1e-4


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_rslora_divides_by_the_root_of_the_rank(rslora, scale):
    assert LoRAConfig(lora_rank=4, lora_alpha=8.0, rslora=rslora).scale == scale


def test_alpha_is_twice_the_rank_by_default():
    assert LoRAConfig(lora_rank=5).alpha == 10.0


def test_only_the_targets_are_trainable():
    model = make_model("llama")
    inject(model, LoRAConfig(lora_rank=4, lora_targets=["q_proj", "mlp.up_proj"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{i}.{layer}.{half}"
        for i in range(2)
        for layer in ("self_attn.q_proj", "mlp.up_proj")
        for half in "AB"
    }


def test_all_linear_leaves_the_output_head_alone(kind):
    model = make_model(kind)
    adapter = inject(model, LoRAConfig(lora_rank=4))
    assert len(adapter.layers) == {"llama": 2 * 7, "gpt2": 2 * 4}[kind]
    assert "lm_head" not in adapter.layers


def test_a_target_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="lora_targets.*'query'.*q_proj"):
        inject(make_model("llama"), LoRAConfig(lora_targets=["query"]))


@pytest.mark.parametrize(
    ("field", "value"), [("lora_rank", 0), ("lora_alpha", 0.0), ("lora_alpha", float("nan")), ("lora_targets", [])]
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        LoRAConfig(**{field: value})


def test_the_vector_round_trips():
    adapter = make_policy().adapter
    theta = torch.randn(adapter.size)
    adapter.assign(theta)
    assert torch.equal(adapter.vector(), theta)


def test_a_vector_of_another_length_is_refused():
    adapter = make_policy().adapter
    with pytest.raises(ValueError, match="adapter"):
        adapter.assign(torch.zeros(adapter.size + 1))


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another():
    a, b, c = (inject(make_model("llama"), LoRAConfig(), seed).vector() for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_our_files_and_gives_the_same_logits(kind, rslora, tmp_path):
    peft = pytest.importorskip("peft", reason="parity needs peft (requirements-dev.txt)")
    model = make_model(kind)
    base = logits(model)
    moved(model, rslora=rslora).save(tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(make_model(kind), tmp_path).eval()
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    assert (logits(theirs) - base).abs().max() > 0.1


def test_we_load_pefts_files_and_give_the_same_logits(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="parity needs peft (requirements-dev.txt)")
    target = {"llama": "q_proj", "gpt2": "c_attn"}[kind]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[target], init_lora_weights=False, fan_in_fan_out=kind == "gpt2"
    )
    theirs = peft.get_peft_model(make_model(kind), config).eval()
    theirs.save_pretrained(tmp_path)
    model = make_model(kind)
    adapter = inject(model, LoRAConfig(lora_rank=4, lora_alpha=8, lora_targets=[target]))
    adapter.load(tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-4


def test_saved_and_loaded_it_is_the_same_adapter(tmp_path):
    adapter = moved(make_model("gpt2"))
    adapter.save(tmp_path, "base")
    other = inject(make_model("gpt2"), LoRAConfig(lora_rank=4), seed=9)
    other.load(tmp_path)
    assert torch.equal(other.vector(), adapter.vector())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    moved(make_model("llama")).save(tmp_path, "base")
    with pytest.raises(ValueError, match="lora_rank"):
        inject(make_model("llama"), LoRAConfig(lora_rank=8)).load(tmp_path)


def test_an_adapter_of_other_layers_is_refused(tmp_path):
    moved(make_model("llama")).save(tmp_path, "base")
    with pytest.raises(ValueError, match="lora_targets"):
        inject(make_model("llama"), LoRAConfig(lora_rank=4, lora_targets=["q_proj"])).load(tmp_path)


def test_a_missing_adapter_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="adapter_config.json"):
        inject(make_model("llama"), LoRAConfig()).load(tmp_path)


def saved_with(directory, **settings):
    """An adapter, and its files in `directory` with some of PEFT's settings changed."""
    adapter = moved(make_model("llama"))
    adapter.save(directory, "base")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return adapter


ALTERING = {
    "peft_type": ["LOHA", None],
    "task_type": ["SEQ_CLS"],
    "bias": ["all", "lora_only"],
    "init_lora_weights": ["olora", "pissa", "pissa_niter_4", "eva", "corda", "loftq", "lora_ga", "of next year"],
    "rank_pattern": [{"q_proj": 8}],
    "alpha_pattern": [{"q_proj": 8}],
    "modules_to_save": [["lm_head"]],
    "trainable_token_indices": [[3]],
    "target_parameters": [["experts.up"]],
    "megatron_config": [{"a": 1}],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"a": 1}],
    "lora_ga_config": [{"scale": "stable"}],
    "use_dora": [True],
    "velora_config": [{"scale": 1.0}],
    "alora_invocation_tokens": [[9]],
    "use_qalora": [True],
    "monteclora_config": [{"num_samples": 8}],
    "layer_replication": [[[0, 2]]],
    "lora_bias": [True],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"beta": 1.0}],
    "ensure_weight_tying": [True],
    "a_setting_of_next_year": [True, 1, {"a": 0}],
}
ASIDE = {
    "lora_dropout": 0.1, "inference_mode": False, "revision": "main", "peft_version": "9", "auto_mapping": {"a": 1},
    "megatron_core": "core", "qalora_group_size": 8, "exclude_modules": ["x"], "layers_to_transform": [0, 1],
    "layers_pattern": "layers", "target_modules": "regex", "fan_in_fan_out": True, "base_model_name_or_path": None,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ALTERING.items() for value in values])
def test_a_setting_that_alters_the_function_is_refused_by_name(key, value, tmp_path):
    with pytest.raises(ValueError, match=f"^adapter: .*adapter_config.json has {key} = .*, which .*; .*$"):
        saved_with(tmp_path, **{key: value}).load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [*ASIDE.items(), ("a_setting_of_next_year", None), ("task_type", None), ("loftq_config", {})]
)
def test_a_setting_that_alters_nothing_is_taken(key, value, tmp_path):
    adapter = saved_with(tmp_path, **{key: value})
    saved = adapter.vector()
    adapter.assign(torch.zeros_like(saved))
    adapter.load(tmp_path)
    assert torch.equal(adapter.vector(), saved)


def test_every_setting_of_pefts_is_known_to_alter_the_function_or_not():
    peft = pytest.importorskip("peft", reason="parity needs peft (requirements-dev.txt)")
    written = peft.LoraConfig().to_dict().keys() - {"r", "lora_alpha", "use_rslora"}  # what this LoRA computes with
    assert written == (ALTERING.keys() | ASIDE.keys()) - {"a_setting_of_next_year"}


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_however_peft_started_a_and_b_the_logits_are_pefts(start, tmp_path):
    peft = pytest.importorskip("peft", reason="parity needs peft (requirements-dev.txt)")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=start)
    theirs, model = peft.get_peft_model(make_model("llama"), config).eval(), make_model("llama")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs.save_pretrained(tmp_path)
    inject(model, LoRAConfig(lora_rank=4, lora_alpha=8, lora_targets=["q_proj", "up_proj"])).load(tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    assert (logits(theirs) - logits(make_model("llama"))).abs().max() > 0.1


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_took_a_part_out_of_the_base_weights_loads_once_peft_has_converted_it(start, tmp_path):
    peft = pytest.importorskip("peft", reason="parity needs peft (requirements-dev.txt)")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=start)
    theirs = peft.get_peft_model(make_model("llama"), config).eval()
    theirs.peft_config["default"].init_lora_weights = True  # PEFT's recipe: the start, saved as any adapter
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1)
    adapter = inject(model := make_model("llama"), LoRAConfig(lora_rank=8, lora_alpha=16, lora_targets=["q_proj"]))
    theirs.save_pretrained(tmp_path / "as it is")
    with pytest.raises(ValueError, match="init_lora_weights.*path_initial_model_for_weight_conversion"):
        adapter.load(tmp_path / "as it is")
    theirs.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "start")
    adapter.load(tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "8", '"r"', "null", "{}", '{"r": 4}', '{"r": 0, "lora_alpha": 8}', '{"r": "4", "lora_alpha": 8}',
     '{"r": null, "lora_alpha": 8}', '{"r": -1, "lora_alpha": 8, "use_rslora": true}'],
)  # fmt: skip
def test_a_damaged_config_is_refused_in_one_line(text, tmp_path):
    adapter = saved_with(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^adapter: .*adapter_config.json is damaged \(.*$"):
        adapter.load(tmp_path)


def test_damaged_tensors_are_refused_in_one_line(tmp_path):
    adapter = saved_with(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"^adapter: .*adapter_model.safetensors is damaged \(.*$"):
        adapter.load(tmp_path)


def test_tensors_of_another_shape_are_refused_and_nothing_is_copied(tmp_path):
    adapter = saved_with(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    safetensors.torch.save_file({**tensors, name: tensors[name][:1]}, tmp_path / "adapter_model.safetensors")
    before = adapter.vector() + 1.0
    adapter.assign(before)
    with pytest.raises(ValueError, match="up_proj.lora_B"):
        adapter.load(tmp_path)
    assert torch.equal(adapter.vector(), before)


def by_assigning(adapter):
    adapter.assign(adapter.vector() * 1.5)


def by_loading(adapter, tmp_path):
    saved = adapter.vector()
    by_assigning(adapter)
    adapter.save(tmp_path, "base")
    adapter.assign(saved)
    adapter.load(tmp_path)


def by_a_step(adapter, kind):
    optimizer = getattr(torch.optim, kind)(adapter.parameters, lr=0.1)
    for parameter in adapter.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def by_replacing(adapter):
    for layer in adapter.layers.values():
        layer.A = torch.nn.Parameter(-layer.A.detach())
        layer.B = torch.nn.Parameter(2.0 * layer.B.detach())


def in_place(adapter, half):
    with torch.no_grad():
        for layer in adapter.layers.values():
            getattr(layer, half).mul_(-1.0)


CHANGES = {
    "only A": lambda adapter, _: in_place(adapter, "A"),
    "only B": lambda adapter, _: in_place(adapter, "B"),
    "other parameters": lambda adapter, _: by_replacing(adapter),
    "assign": lambda adapter, _: by_assigning(adapter),
    "load": by_loading,
    "adam": lambda adapter, _: by_a_step(adapter, "Adam"),
    "sgd": lambda adapter, _: by_a_step(adapter, "SGD"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_over_16_bit_weights_every_change_of_the_adapter_reaches_the_next_pass(change, tmp_path):
    policy = make_policy(dtype=torch.bfloat16)
    layer = next(iter(policy.adapter.layers.values()))
    x = torch.randn(5, layer.base.weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    before, addresses = layer(x), [half.data_ptr() for half in policy.adapter.leaves()]
    change(policy.adapter, tmp_path)
    A, B = (half.detach().bfloat16().float() for half in (layer.A, layer.B))
    expected = layer.base(x).float() + layer.scale * (x.float() @ A.T).bfloat16().float() @ B.T
    after = layer(x)
    assert (after.float() - expected).abs().max() <= 0.02 * expected.abs().max()
    assert (after - before).abs().max() > 0.1 * expected.abs().max()
    assert [half.data_ptr() for half in policy.adapter.leaves()] == addresses  # where a captured graph reads


def test_the_gradient_is_taken_in_the_parameters_or_in_their_rounded_copies():
    exact, rounded = make_policy().adapter, make_policy(dtype=torch.bfloat16).adapter
    assert all(leaf is parameter for leaf, parameter in zip(exact.leaves(), exact.parameters, strict=True))
    for leaf, parameter in zip(rounded.leaves(), rounded.parameters, strict=True):
        assert leaf.requires_grad and torch.equal(leaf, parameter.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_rounded_copies_follow_the_base_weights_to_another_type(dtype):
    policy = make_policy(dtype=torch.bfloat16)
    policy.adapter.leaves()
    policy.model.to(dtype)
    assert {leaf.dtype for leaf in policy.adapter.leaves()} == {dtype}
    assert policy.model(input_ids=torch.tensor([[3, 4]])).logits.dtype == dtype
