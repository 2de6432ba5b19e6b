"""rewards.py and app/objectives.py: specs, users' files, what functions get and may return, calibration."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from app.objectives import load_objectives, parse_spec
from clients import Client
from rewards import RULES, Objective, calibration_sums, combine_sums, score


def make_prompts(*columns):
    prompts = [SimpleNamespace(subset="s", columns=own) for own in columns]
    for i, prompt in enumerate(prompts):
        prompt.text, prompt.messages = f"\n\nHuman: q{i}\n\nAssistant:", ({"role": "user", "content": f"q{i}"},)
    return prompts


def score_of(function):
    return score([Objective("mine", "py:x", function)], make_prompts({}, {}), ["a", "b"], [[1], [1]])


def user_file(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return f"py:{path}:f"


def of_one_text(spec):
    return score(load_objectives([spec]), make_prompts({}), ["a"], [[1]]).item()


def test_a_spec_has_a_name_a_kind_and_the_rest():
    assert parse_spec("rule:length") == ("length", "rule", "length")
    assert parse_spec("hf:a/b=c/rm-1.5/") == ("rm-1-5", "hf", "a/b=c/rm-1.5/")
    assert parse_spec("py:dir/f.py:g") == ("g", "py", "dir/f.py:g")
    assert parse_spec("x=py:C:/f.py:g") == ("x", "py", "C:/f.py:g")


@pytest.mark.parametrize(
    ("specs", "complaint"),
    [
        (["url:x"], "a KIND of rule, hf, py"),
        (["a b=rule:length"], r"not \[NAME=\]KIND:REST"),
        (["rule:lengthy"], "no rule 'lengthy'; choose from length, brevity"),
        (["py:nowhere.py:f"], "no file 'nowhere.py'"),
        (["disagreement=rule:length"], "another figure of the log"),
        (["rule:length", "length=rule:brevity"], "length, length has a name twice"),
    ],
)
def test_bad_specs_are_refused(specs, complaint):
    with pytest.raises(ValueError, match=f"^objectives: .*{complaint}"):
        load_objectives(specs)


def test_rules_say_what_they_promise():
    of = lambda name, *texts: RULES[name](prompts=["q"] * len(texts), completions=list(texts), extra=[1])  # noqa: E731
    assert of("length", " one two\nthree", "") == [3, 0]
    assert of("brevity", "", "w " * 20) == [1, 0.5]
    assert of("distinct", "a b a b a", "a") == [0.5, 1]


def test_folders_have_modules_of_their_own_and_neither_they_nor_the_project_see_the_others(tmp_path):
    before = {name: sys.modules.get(name) for name in ("data", "rewards", "words", "late", "mine", "numpy")}
    source = "import data, numpy\nfrom rewards import value\nfrom words.parts import more\ndef f(completions, **_):\n"
    source += "    from late import least\n    return [data.value + value + more + least for _ in completions]\n"
    specs = []
    for n, folder in enumerate("ab", start=1):
        specs.append(f"{folder}=" + user_file(tmp_path / folder / "mine.py", source))
        user_file(tmp_path / folder / "data.py", f"value = {n * 1000}")
        user_file(tmp_path / folder / "rewards.py", f"value = {n * 100}")
        if folder == "a":  # Python asks for none
            user_file(tmp_path / folder / "words" / "__init__.py", "")
        user_file(tmp_path / folder / "words" / "parts.py", f"from data import value\nmore = value + {n * 10}")
        user_file(tmp_path / folder / "late.py", f"least = {n}")
        user_file(tmp_path / folder / "numpy" / "tool.py", "a mere folder yields to the library")
    first, second = load_objectives(specs)
    for _ in range(2):
        assert score([first, second], make_prompts({}), ["x"], [[1]]).tolist() == [[2111, 4222]]
    assert {name: sys.modules.get(name) for name in before} == before and sys.modules["data"] is data
    assert not [entry for entry in sys.path if entry.startswith(str(tmp_path))]


def test_a_users_file_may_define_dataclasses_and_give_its_neighbours_functions_to_processes(tmp_path):
    user_file(tmp_path / "helper.py", "def double(n):\n    return 2 * n\n")
    source = "from __future__ import annotations\nimport dataclasses, helper, multiprocessing\n"
    source += "@dataclasses.dataclass\nclass C:\n    x: int\ndef f(completions, **_):\n"
    source += "    with multiprocessing.get_context('fork').Pool(1) as pool:\n"
    source += "        return pool.map(helper.double, [C(1).x])\n"
    assert of_one_text(user_file(tmp_path / "mine.py", source)) == 2


def test_files_are_looked_for_here_then_in_the_project_whose_modules_exist_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (objective,) = load_objectives(["py:worlds/toy.py:topic_of"])
    assert list(objective.function(prompt="\n\nHuman: How do I bake bread?\n\nAssistant:")) == list("bake bread")
    assert "worlds.toy" in sys.modules and "toy" not in sys.modules
    user_file(tmp_path / "worlds" / "toy.py", "def f(completions, **_):\n    return [7]\n")
    assert of_one_text("py:worlds/toy.py:f") == 7


RAISES = [
    "1 / 0", "def f(**_):\n    return [1 / 0]", "def f(**_):\n    yield 1 / 0", "def f(**_):\n    next(iter(()))",
    "import sys\ndef f(**_):\n    sys.exit(0)", "def f(**_):\n    return 1.0", "g = 1",
]  # fmt: skip


@pytest.mark.parametrize("source", RAISES)
def test_what_a_users_code_raises_is_the_cause_of_an_error_that_names_the_objective(tmp_path, source):
    spec = user_file(tmp_path / "mine.py", source)
    with pytest.raises(ValueError, match=r"objective py:.*mine.py:f failed( at .*mine.py:\d+)?: \w+: ") as caught:
        of_one_text(spec)
    assert type(caught.value.__cause__).__name__ in str(caught.value)


def test_a_users_code_may_leave_the_working_directory_and_the_run_stays(tmp_path):
    here = os.getcwd()
    of_one_text(user_file(tmp_path / "mine.py", "import os\ndef f(**_):\n    os.chdir('/')\n    return [0]\n"))
    assert os.getcwd() == here


@pytest.mark.parametrize("edited", ["mine.py", "helper.py", "words/parts.py", "lib/deep/part.py"])
def test_a_fingerprint_follows_all_code_of_the_folder(tmp_path, edited):
    spec = user_file(tmp_path / "mine.py", "def f(**_):\n    return [0]\n")
    for name in ("helper.py", "words/__init__.py", "words/parts.py", "lib/deep/part.py"):
        user_file(tmp_path / name, "x = 1\n")
    first, again = (load_objectives([spec])[0].fingerprint for _ in range(2))
    with open(tmp_path / edited, "a") as file:
        file.write("y = 2\n")
    assert first == again != load_objectives([spec])[0].fingerprint


def test_a_function_gets_trls_arguments_by_keyword_and_no_column_displaces_them():
    seen = {}
    objective = Objective("mine", "py:x", lambda **given: seen.update(given) or [1.0, 2])
    prompts = make_prompts({"answer": 4, "completions": 5}, {"level": "x"})
    assert score([objective], prompts, ["a", "b"], [[5], [6, 7]]).tolist() == [[1.0], [2.0]]
    assert seen.pop("prompts") == ["\n\nHuman: q0\n\nAssistant:", "\n\nHuman: q1\n\nAssistant:"]
    assert seen.pop("messages") == [[{"role": "user", "content": "q0"}], [{"role": "user", "content": "q1"}]]
    columns = {"answer": [4, None], "level": [None, "x"], "subset": ["s", "s"]}  # None where a row has no value
    assert seen == columns | {"completions": ["a", "b"], "completion_ids": [[5], [6, 7]]}


def test_numbers_of_any_library_are_rewards():
    for values in (torch.tensor([1.0, 2.0]), np.array([1, 2]), (x for x in (True, 2))):
        assert score_of(lambda values=values, **_: values).tolist() == [[1], [2]]


def of_client(index, *held):
    return Client(index, [], list(held), None)


def scores(*objectives, client=None):
    return score(objectives, make_prompts({"tags": ["x"]}, *[{}] * 4), list("abcde"), [[i] for i in range(5)], client)


def test_a_function_is_called_for_a_client_that_holds_it_and_for_no_other():
    called = []
    objectives = [Objective(name, "py:x", lambda name=name, **_: called.append(name) or [1] * 5) for name in "yz"]
    np.testing.assert_equal(scores(*objectives, client=of_client(4, 1)).numpy(), [[np.nan, 1]] * 5)
    assert called == ["z"] and scores(*objectives).tolist() == [[1, 1]] * 5


@pytest.mark.parametrize("bad", [None, float("nan"), -float("inf"), "1", [1.0], 10**999, torch.ones(2)], ids=str)
def test_a_reward_that_is_not_a_finite_number_is_refused_by_objective_client_and_prompt(bad):
    function = lambda completions, **_: [bad if text == "e" else 0.0 for text in completions]  # noqa: E731
    with pytest.raises(ValueError, match="objective 'mine' returned .* for client 7 and the prompt 'Human: q4 Assista"):
        scores(Objective("mine", "py:x", function), client=of_client(7, 0))
    with pytest.raises(ValueError, match="objective 'mine' returned 1 rewards for 2 completions"):
        score_of(lambda **_: [1.0])


def test_a_function_that_changes_what_it_gets_spoils_nothing():
    def spoil(messages, completion_ids, tags, **columns):
        for value in (messages[0][0], messages, completion_ids[0], completion_ids, tags[0], tags, *columns.values()):
            value.clear()
        return [0.0] * 5

    given, expected = {}, {}
    witness = lambda into: Objective("w", "py:x", lambda **columns: into.update(columns) or [0.0] * 5)  # noqa: E731
    scores(witness(expected), Objective("spoiler", "py:x", spoil), witness(given))
    assert given == expected and given["tags"][0] == ["x"] and given["messages"][0][0]["content"] == "q0"


def test_calibration_gives_mean_0_and_deviation_1_however_the_samples_are_spread_over_clients():
    samples = np.random.default_rng(0).normal([3, -1e8, 0], [2, 0.5, 1e-8], size=(300, 3))
    lacking = samples.copy()
    lacking[:100, 0] = lacking[200:, 1] = np.nan  # clients of 100 that lack an objective
    for values, parts in [(samples, [300]), (samples, [1, 99, 200]), (samples, [0, 150, 150]), (lacking, [100] * 3)]:
        raw = torch.from_numpy(values)
        calibration = combine_sums([calibration_sums(part) for part in raw.split(parts)])
        assert np.allclose(calibration.mean, np.nanmean(values, axis=0), rtol=1e-12, atol=1e-20)
        assert np.allclose(calibration.scale, np.nanstd(values, axis=0), rtol=1e-7)
        z = calibration.apply(raw).numpy()
        assert np.allclose(np.nanstd(z, axis=0), 1, rtol=1e-6) and np.array_equal(np.isnan(z), np.isnan(values))
        assert not calibration.constant.any()


def test_an_objective_that_does_not_vary_gets_scale_1_and_is_marked():
    same = torch.tensor([0.0, 0.1, -1 / 3, 1e6 / 7], dtype=torch.float64).expand(37, -1)
    raw = torch.cat([same, torch.arange(37.0).double()[:, None]], dim=1)
    calibration = combine_sums([calibration_sums(raw[:5]), calibration_sums(raw[5:])])
    assert calibration.constant.tolist() == [True] * 4 + [False]
    assert calibration.scale[:4].tolist() == [1] * 4
    assert calibration.apply(raw)[:, :4].abs().max() < 1e-8


def test_a_pooled_calibration_averages_the_variances_and_counts_0_for_what_does_not_vary():
    pooled = combine_sums([calibration_sums(torch.tensor([[1.0, 3.0], [1.0, 7.0]]))]).pooled()
    assert pooled.mean.tolist() == [3, 3] and pooled.scale.tolist() == pytest.approx([2**0.5] * 2)
    assert combine_sums([calibration_sums(torch.ones(3, 2))]).pooled().scale.tolist() == [1, 1]
