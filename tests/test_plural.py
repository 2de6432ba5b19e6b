"""How policies of the survey world are judged: by what its groups truly think."""

import numpy as np
import pytest
import torch

distance = pytest.importorskip("scipy.spatial.distance", reason="the experiments need SciPy, see requirements-dev.txt")

from app import predictor  # noqa: E402
from app.options import PRESETS  # noqa: E402
from app.session import Session  # noqa: E402
from experiments import extensions  # noqa: E402
from settings import Config  # noqa: E402
from worlds import survey  # noqa: E402


def test_the_truth_is_the_expected_share_and_the_distance_under_the_policys_own_probabilities():
    session = Session(Config(**PRESETS["plural-firm-tiny"] | {"objectives": ["rule:length"]}), progress=False)
    prompt = session.held_out[0]
    session.held_out = [prompt]
    one, options = extensions.truth(session, 0), prompt.columns["options"]
    with torch.no_grad():
        pi = session.policy.model(torch.tensor([prompt.token_ids])).logits[0, -1].double().softmax(0)
    pi = torch.stack([pi[session.policy.tokenizer.vocab[option]] for option in options])
    issue, groups = survey.issue_of(prompt.columns["question"]), [slug.replace("-", " ") for slug in extensions.GROUPS]
    true = [survey.Opinions(0).shares(group, issue, options) for group in groups]
    shares = [float(pi @ torch.tensor(of_group)) for of_group in true]
    apart = [distance.jensenshannon(pi / pi.sum(), of_group) for of_group in true]  # SciPy's, in nats
    assert one == pytest.approx(
        {"worst_share": min(shares), "mean_share": np.mean(shares), "worst_alignment": 1 - max(apart)}
    )


def test_convergence_is_counted_in_rounds_to_fixed_levels(tmp_path, monkeypatch):
    curves = {"federated": [0.5, 0.72, 0.72, 0.72, 0.9, 0.9], "centralised": [0.5, 0.5, 0.6, 0.6, 0.6, 0.6]}
    lines = [{"round": 2 * i + 1} | {f"alignment/{side}": y[i] for side, y in curves.items()} for i in range(6)]
    guess = {"unseen": True, "uniform": 0.5, "mean answer": 0.5}
    summary = {"sides": dict.fromkeys(curves, {}), "groups": {"a": guess}, "context": {"own": 0.8, "other": 0.4}}
    monkeypatch.setattr(predictor, "train", lambda config, progress: summary)
    monkeypatch.setattr(extensions, "read_lines", lambda file: lines)
    rows = extensions.measure_predictor({"seed": 1}, tmp_path)
    sides = extensions.by_side({"x": rows})
    rounds = {label: [of[f"rounds_to_{level}"] for level in (0.7, 0.75)] for label, (of,) in sides.items()}
    # the mean of three evaluations passes 0.7 with the fourth, 0.75 with the fifth, each after two rounds more
    assert rounds["federated, x"] == [8, 10] and np.isnan(rounds["centralised, x"]).all()
