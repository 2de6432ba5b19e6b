"""rewards.py: which functions objectives are, what they are given, what they may return, how they are calibrated."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rewards
from app.user_code import ObjectiveFailed
from data import Prompt
from rewards import RULES, Calibration, Objective, calibration_sums, combine, load_objectives, parse_spec, score


def make_prompts(*columns):
    return [
        Prompt(f"\n\nHuman: q{i}\n\nAssistant:", ({"role": "user", "content": f"q{i}"},), "", (1,), "s", dict(c))
        for i, c in enumerate(columns)
    ]


def user_file(tmp_path, monkeypatch, source, name="mine.py"):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / name).write_text(source)


def returning(value):
    return [Objective("mine", "py:x", lambda **_: value)]


# ---- specs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("rule:length", ("length", "rule", "length")),
        ("words=rule:length", ("words", "rule", "length")),
        ("hf:Ray2333/gpt2-large-helpful-reward_model", ("gpt2-large-helpful-reward_model", "hf", None)),
        ("hf:a/b=c/rm/", ("rm", "hf", "a/b=c/rm/")),
        ("py:dir/f.py:g", ("g", "py", "dir/f.py:g")),
        ("x=py:C:/f.py:g", ("x", "py", "C:/f.py:g")),
    ],
)
def test_a_spec_has_a_name_a_kind_and_the_rest(spec, parsed):
    name, kind, rest = parse_spec(spec)
    assert (name, kind) == parsed[:2] and parsed[2] in (rest, None)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("length", "write .*rule:NAME, hf:DIR_OR_HUB, py:FILE.py:FUNCTION or group:"),
        ("url:x", "write .*rule:NAME"),
        ("rule:", "write .*rule:NAME"),
        ("rule:lengthy", "no rule 'lengthy'; choose from length, brevity"),
        ("py:f.py", "name the function"),
        ("py:nowhere.py:f", "no Python file nowhere.py"),
        ("a b=rule:length", "name 'a b' may have only"),
        ("=rule:length", "name '' may have only"),
        ("disagreement=rule:length", "the metrics use that name; put another NAME= in front"),
        ("hf:models/gpt2.large", "put NAME= in front"),
        ("hf:/nowhere/rm", "objective 'rm': /nowhere/rm cannot be loaded .* pass a local checkpoint directory"),
    ],
)
def test_a_bad_spec_gets_one_line_with_the_remedy(spec, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        load_objectives([spec])
    assert "\n" not in str(caught.value)


def test_two_objectives_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two are called 'length'"):
        load_objectives(["rule:length", "length=rule:brevity"])
    assert [o.name for o in load_objectives(["rule:length", "short=rule:brevity"])] == ["length", "short"]
    with pytest.raises(ValueError, match="objectives"):
        load_objectives([])


def test_everything_else_is_checked_before_a_reward_model_is_loaded(monkeypatch):
    monkeypatch.setattr(rewards, "load_reward_model", lambda *_, **__: pytest.fail("loaded one"))
    for specs in (["hf:a/rm", "hf:b/rm"], ["hf:a/rm", "rule:lengthy"], ["hf:a/rm", "py:nowhere.py:f"]):
        with pytest.raises(ValueError, match="two are called|no rule|no Python file"):
            load_objectives(specs)


def test_objectives_come_in_the_order_of_their_specs_and_reward_models_score_the_cohort_at_once(monkeypatch):
    monkeypatch.setattr(
        rewards, "load_reward_model", lambda where, *_, **__: SimpleNamespace(where=where, model=torch.nn.Linear(1, 1))
    )
    objectives = load_objectives(["hf:a/rm", "rule:length", "second=hf:b/rm"])
    assert [(o.name, o.cohort) for o in objectives] == [("rm", True), ("length", False), ("second", True)]
    assert [objectives[0].function.where, objectives[2].function.where] == ["a/rm", "b/rm"]


# ---- rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "completion", "value"),
    [
        ("length", " one two\nthree", 3),
        ("brevity", "", 1),
        ("brevity", "w " * 20, 0.5),
        ("distinct", "a b a b a", 0.5),
        ("distinct", "a b c", 1),
        ("distinct", "", 1),
        ("sentence", 'He said "no."  ', 1),
        ("sentence", "It is 3.5 or", 0),
        ("on_topic", "Bake pies with pumpkin", 0.5),
        ("refusal", "I’m afraid I can’t.", 1),
        ("refusal", "Do you want one? I can.", 0),
    ],
)
def test_rules_say_what_they_promise(name, completion, value):
    prompt = "\n\nHuman: shortbread?\n\nAssistant: no\n\nHuman: Pumpkin soup, or a pie?\n\nAssistant:"
    assert RULES[name](prompts=[prompt], completions=[completion], extra=[1]) == [value]


def test_every_rule_is_documented_and_gives_a_float_for_silence():
    for rule in RULES.values():
        assert rule.__doc__ and "\n" not in rule.__doc__
        assert [type(x) for x in rule(prompts=["\n\nHuman:\n\nAssistant:"], completions=[""])] == [float]


# ---- a user's own function -----------------------------------------------------------------------------------


def test_a_users_function_gets_trls_arguments_by_keyword(tmp_path, monkeypatch):
    user_file(tmp_path, monkeypatch, "def f(completions, answer, **kw):\n    seen.append((completions, answer, kw))\n"
              "    return [1.0, 2]\nseen = []\n")  # fmt: skip
    (objective,) = load_objectives(["py:mine.py:f"])
    scores = score([objective], make_prompts({"answer": 4}, {"level": "x"}), ["a", "b"], [[5], [6, 7]])
    assert scores.tolist() == [[1.0], [2.0]] and scores.dtype == torch.float64
    ((completions, answer, others),) = objective.function.__globals__["seen"]
    assert completions == ["a", "b"] and answer == [4, None]  # a column that a row lacks is None there
    assert others == {
        "prompts": ["\n\nHuman: q0\n\nAssistant:", "\n\nHuman: q1\n\nAssistant:"],
        "completion_ids": [[5], [6, 7]],
        "messages": [[{"role": "user", "content": "q0"}], [{"role": "user", "content": "q1"}]],
        "subset": ["s", "s"],
        "level": [None, "x"],
    }


def test_a_file_is_looked_for_here_and_then_in_the_project_and_imported_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (objective,) = load_objectives(["py:rewards.py:length"])
    assert objective.function is rewards.length
    user_file(tmp_path, monkeypatch, "def length(**_):\n    return []\n", "rewards.py")
    assert load_objectives(["py:rewards.py:length"])[0].function is not rewards.length


def test_a_users_file_may_define_dataclasses_and_import_its_neighbours(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 7.0\n")
    user_file(tmp_path, monkeypatch, "from __future__ import annotations\nfrom dataclasses import dataclass\n"
              "import neighbour_of_mine\n@dataclass\nclass C:\n    x: int = 1\n"
              "def f(completions, **_):\n    return [neighbour_of_mine.VALUE] * len(completions)\n")  # fmt: skip
    (objective,) = load_objectives([f"py:{tmp_path / 'mine.py'}:f"])
    assert score([objective], make_prompts({}), ["a"], [[1]]).item() == 7


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("f = 3", "has no function 'f'"),
        ("def f(prompts, completions): pass", r"must take \(prompts, completions, \*\*columns\) by keyword"),
        ("def f(*texts): pass", "must take"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_once(tmp_path, monkeypatch, source, complaint):
    user_file(tmp_path, monkeypatch, source)
    with pytest.raises(ValueError, match=f"objective 'f'.*{complaint}"):
        load_objectives(["py:mine.py:f"])


def test_what_a_users_code_raises_surfaces_with_the_objectives_name(tmp_path, monkeypatch):
    user_file(tmp_path, monkeypatch, "1 / 0\n")
    for _ in range(2):  # a file that failed is not taken for imported
        with pytest.raises(ObjectiveFailed, match="objective 'f' .*ZeroDivisionError") as caught:
            load_objectives(["py:mine.py:f"])
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    Path("mine.py").write_text("def f(**columns):\n    return columns['nope']\n")
    with pytest.raises(ObjectiveFailed, match="objective 'f' .*KeyError: 'nope'") as caught:
        score(load_objectives(["py:mine.py:f"]), make_prompts({}), ["a"], [[1]])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("code", ["next(x for x in ())", "sys.exit(0)"])
def test_a_function_that_stops_the_loop_or_the_program_has_failed_too(tmp_path, monkeypatch, code):
    user_file(tmp_path, monkeypatch, f"import sys\ndef f(**columns):\n    {code}\n")
    with pytest.raises(ObjectiveFailed, match="objective 'f' .*(StopIteration|SystemExit)"):
        score(load_objectives(["py:mine.py:f"]), make_prompts({}), ["a"], [[1]])


# ---- scoring -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [None, float("nan"), float("inf"), -float("inf"), "good", "1", [1.0], 10**999, torch.ones(2)], ids=str
)
def test_a_reward_that_is_no_finite_number_is_refused_by_objective_and_prompt(bad):
    with pytest.raises(ValueError, match=r"objective 'mine' returned .* for the prompt 'Human: q1 Assistant:'"):
        score(returning([1.0, bad]), make_prompts({}, {}), ["a", "b"], [[1], [1]])


def test_the_wrong_number_of_rewards_is_refused():
    with pytest.raises(ValueError, match="objective 'mine' returned 1 rewards for 2 completions"):
        score(returning([1.0]), make_prompts({}, {}), ["a", "b"], [[1], [1]])


async def coroutine(**columns):
    return [0.0]


@pytest.mark.parametrize(
    "returned",
    [3.0, torch.tensor(1.0), np.float64(1), {"a": 1.0}, "1", None, coroutine(), len],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_rewards_that_are_no_list_are_refused_by_their_type(returned):
    with pytest.raises(ValueError, match=rf"objective 'mine' returned a {type(returned).__name__} for 1 comp.*a list"):
        score(returning(returned), make_prompts({}), ["a"], [[1]])


def test_a_generator_may_yield_the_rewards_and_what_it_raises_is_the_users():
    assert score(returning(x for x in (1, 2)), make_prompts({}, {}), ["a", "b"], [[1], [1]]).tolist() == [[1], [2]]
    with pytest.raises(ObjectiveFailed, match="ZeroDivisionError"):
        score(returning(1 / x for x in (1, 0)), make_prompts({}, {}), ["a", "b"], [[1], [1]])


def test_numbers_of_any_library_are_rewards_and_objectives_are_columns():
    values = [torch.tensor([0.1, 0.2]), np.array([1, 2]), (True, 3)]
    objectives = [returning(v)[0] for v in values]
    scores = score(objectives, make_prompts({}, {}), ["a", "b"], [[1], [1]])
    assert torch.allclose(scores, torch.tensor([[0.1, 1, 1], [0.2, 2, 3]], dtype=torch.float64))


def test_data_columns_cannot_displace_what_objectives_are_given():
    seen = {}
    objective = Objective("mine", "py:x", lambda **given: seen.update(given) or [0.0])
    score([objective], make_prompts({"prompts": 1, "completions": 2, "completion_ids": 3, "messages": 4}), ["a"], [[9]])
    assert seen["completions"] == ["a"] and seen["completion_ids"] == [[9]] and seen["messages"][0][0]["role"] == "user"


# ---- clients -------------------------------------------------------------------------------------------------

CLIENTS = [
    (slice(0, 2), [0, 1], 4),
    (slice(2, 3), [1], 6),
    (slice(3, 5), [0], 7),
]  # one lacks 0, one 1


def score_of_clients(clients, *objectives, prompts=None):
    return score(objectives, prompts or make_prompts(*[{}] * 5), list("abcde"), [[i] for i in range(5)], clients)


def recording(cohort=False):
    """An objective whose rewards are the ids of the responses, and the list of responses it sees, call by call."""
    seen = []

    def function(completions, completion_ids, **_):
        seen.append("".join(completions))
        return [ids[0] for ids in completion_ids]

    return Objective("mine", "py:x", function, cohort), seen


def test_a_function_sees_the_rows_of_one_client_at_a_time_and_of_those_that_hold_it_alone():
    (first, of_first), (second, of_second) = recording(), recording()
    score_of_clients(CLIENTS, first, second)
    assert of_first == ["ab", "de"] and of_second == ["ab", "c"]


def test_a_reward_model_sees_the_rows_of_all_clients_that_hold_it_at_once():
    (first, of_first), (second, of_second) = recording(cohort=True), recording(cohort=True)
    score_of_clients(CLIENTS, first, second)
    assert of_first == ["abde"] and of_second == ["abc"]


@pytest.mark.parametrize("cohort", [False, True])
def test_rewards_stand_in_their_own_rows_and_nan_where_a_client_lacks_the_objective(cohort):
    scores = score_of_clients(CLIENTS, recording(cohort)[0], recording(cohort)[0])
    nan = float("nan")
    np.testing.assert_equal(scores.numpy(), [[0, 0], [1, 1], [nan, 2], [3, nan], [4, nan]])


@pytest.mark.parametrize("cohort", [False, True])
def test_an_objective_that_nobody_holds_is_not_called(cohort):
    objective, seen = recording(cohort)
    scores = score_of_clients([(slice(0, 5), [1], 0)], objective, recording()[0])
    assert not seen and scores[:, 0].isnan().all() and scores[:, 1].isfinite().all()


@pytest.mark.parametrize("cohort", [False, True])
def test_a_reward_that_is_not_finite_names_its_client(cohort):
    function = lambda completions, **_: [float("nan") if text == "e" else 0.0 for text in completions]  # noqa: E731
    with pytest.raises(ValueError, match="objective 'mine' returned nan for client 7 and the prompt"):
        score_of_clients(CLIENTS, Objective("mine", "py:x", function, cohort), recording()[0])


def test_without_clients_one_holds_everything():
    objective, seen = recording()
    assert score_of_clients(None, objective)[:, 0].tolist() == [0, 1, 2, 3, 4] and seen == ["abcde"]


def test_every_client_is_given_the_same_columns():
    seen = []
    objective = Objective("mine", "py:x", lambda completions, answer, **_: seen.append(answer) or [0] * len(answer))
    score_of_clients(CLIENTS, objective, recording()[0], prompts=make_prompts({"answer": 4}, *[{}] * 4))
    assert seen == [[4, None], [None, None]]


def test_a_function_that_changes_what_it_is_given_spoils_nothing():
    def spoil(messages, **given):
        for chat in messages:
            chat[0].clear()
        for column in (messages, *given.values()):
            for value in column:
                if isinstance(value, list):
                    value.clear()
            column.clear()
        return [0.0] * 5

    prompts, given = make_prompts(*[{"tags": ["x"]}] * 5), {}
    witness = Objective("witness", "py:x", lambda **arguments: given.update(arguments) or [0.0] * 5)
    score_of_clients(None, Objective("spoiler", "py:x", spoil), witness, prompts=prompts)
    assert given["completions"] == list("abcde") and given["completion_ids"] == [[i] for i in range(5)]
    assert given["tags"] == [["x"]] * 5 and given["subset"] == ["s"] * 5
    assert [m[0]["content"] for m in given["messages"]] == [f"q{i}" for i in range(5)]
    assert prompts == make_prompts(*[{"tags": ["x"]}] * 5)


# ---- calibration ---------------------------------------------------------------------------------------------


def test_calibration_gives_mean_0_and_deviation_1_however_the_samples_are_spread_over_clients():
    rewards = np.random.default_rng(0).normal([3, -1e8, 0], [2, 0.5, 1e-8], size=(300, 3))
    scores = torch.from_numpy(rewards)
    for parts in ([300], [1, 99, 200], [0, 150, 150]):
        calibration = combine([calibration_sums(part) for part in scores.split(parts)])
        assert np.allclose(calibration.mean, rewards.mean(0), rtol=1e-12, atol=1e-20)
        assert np.allclose(calibration.scale, rewards.std(0), rtol=1e-7)
        assert np.allclose(calibration.apply(scores).std(0, correction=0), 1, rtol=1e-6)
        assert not calibration.constant.any()


def test_an_objective_that_does_not_vary_gets_scale_1_and_is_reported():
    same = torch.tensor([0.0, 0.1, -1 / 3, 1e6 / 7], dtype=torch.float64).expand(37, -1)
    scores = torch.cat([same, torch.arange(37.0).double()[:, None]], dim=1)
    calibration = combine([calibration_sums(scores[:5]), calibration_sums(scores[5:])])
    assert calibration.constant.tolist() == [True] * 4 + [False]
    assert calibration.scale[:4].tolist() == [1] * 4
    assert calibration.apply(scores)[:, :4].abs().max() < 1e-8


def test_a_client_counts_only_towards_the_objectives_it_holds():
    raw = np.random.default_rng(0).normal([3, -7], [2, 0.5], size=(60, 2))
    raw[:20, 0] = raw[40:, 1] = np.nan
    calibration = combine([calibration_sums(part) for part in torch.from_numpy(raw).split(20)])
    assert np.allclose(calibration.mean, np.nanmean(raw, axis=0), rtol=1e-12)
    assert np.allclose(calibration.scale, np.nanstd(raw, axis=0), rtol=1e-12)
    assert np.array_equal(np.isnan(calibration.apply(torch.from_numpy(raw))), np.isnan(raw))


def test_a_pooled_calibration_keeps_the_order_of_raw_rewards_of_different_objectives():
    raw = torch.from_numpy(np.random.default_rng(0).normal([0.2, 0.4], [0.1, 0.3], size=(50, 2)))
    calibration = combine([calibration_sums(raw)])
    assert not torch.equal(calibration.apply(raw).argmin(1), raw.argmin(1))
    assert torch.equal(calibration.pooled().apply(raw).argmin(1), raw.argmin(1))


def test_a_pooled_calibration_has_the_mean_variance_of_the_objectives_that_vary_and_of_the_others_0():
    raw = torch.tensor([[1.0, 3.0], [1.0, 7.0]])
    pooled = combine([calibration_sums(raw)]).pooled()
    assert pooled.mean.tolist() == [3, 3]
    assert pooled.scale.tolist() == pytest.approx([2**0.5] * 2)
    assert combine([calibration_sums(torch.ones(3, 2))]).pooled().scale.tolist() == [1, 1]


def test_calibration_survives_json_exactly():
    calibration = combine([calibration_sums(torch.rand(9, 2))])
    again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
    assert all(torch.equal(getattr(again, k), getattr(calibration, k)) for k in ("mean", "scale", "constant"))


def test_calibration_without_samples_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        combine([calibration_sums(torch.empty(0, 2))])


def test_an_objective_without_a_sample_is_named_by_its_number():
    scores = torch.tensor([[1.0, float("nan")], [2.0, float("nan")]])
    with pytest.raises(ValueError, match="no client holds number 2 of 2"):
        combine([calibration_sums(scores)])
