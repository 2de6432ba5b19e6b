"""How policies of the survey world are judged: by what its groups truly think."""

import numpy as np
import pytest
import torch

distance = pytest.importorskip("scipy.spatial.distance", reason="the experiments need SciPy, see requirements-dev.txt")

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
    true = survey.Opinions(0).shares("south 1", survey.issue_of(prompt.columns["question"]), options)
    assert one["share_south-1"] == pytest.approx(float(pi @ torch.tensor(true)))
    apart = distance.jensenshannon(pi / pi.sum(), true)  # SciPy's, in nats
    assert one["alignment_south-1"] == pytest.approx(1 - apart)
    shares = [one[f"share_{group}"] for group in extensions.GROUPS]
    assert (one["worst_share"], one["mean_share"]) == pytest.approx((min(shares), np.mean(shares)))


def test_convergence_is_counted_in_rounds_against_the_better_side_of_each_comparison():
    curves = {"federated": [0.5, 0.9, 0.9, 0.9, 0.9], "centralised": [0.5, 0.5, 0.6, 0.7, 0.7]}
    row = {"seed": 1} | dict.fromkeys(extensions.GUESSES, 0.0)
    for side, curve in curves.items():
        row |= {f"{side}_{name}": curve[-1] for name in extensions.SCORES} | {f"{side}_start": 0.5}
        row |= {f"{side}@{2 * i}": value for i, value in enumerate(curve, 1)}
    counted = row | {"centralised_alignment": 0.97, "centralised@8": 0.97, "centralised@10": 0.97}
    sides = extensions.by_side({extensions.EQUAL: [row], extensions.COUNTED: [counted]})
    rounds = {label: rows[0]["convergence"] for label, rows in sides.items()}
    # 0.5 + 0.95 · 0.4 is first reached by the mean of evaluations 2 to 4; 0.5 + 0.95 · 0.47 never
    assert rounds[f"federated, {extensions.EQUAL}"] == 8
    assert all(np.isnan(value) for label, value in rounds.items() if label != f"federated, {extensions.EQUAL}")
