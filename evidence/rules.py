"""The rules of comparison: what a label means, one tuning budget for every method, and the common setting. [ours]

One tuning grid and budget for every method, on seeds of its own, and beside every method's own best setting a common
one, since a difference between methods that run at different rates may be one of the rates. The KL coefficient is
fixed. How figures are compared is in `statistics.py`.
"""

from itertools import product

import numpy as np

from evidence.lab import Lab
from evidence.statistics import column, where
from settings import METHODS

ONE_REWARD = ["minimum", "maximum", "adaptive"]  # one reward of several groups': `plural.py`
COMPARED = [name for name, method in METHODS.items() if not method.needs_primary and name not in ONE_REWARD]
GRID = {"lr": (1.5e-3, 3e-3, 6e-3), "server_lr": (1.0, 2.0), "kl_coef": (0.003, 0.01)}
TUNING_SEEDS = (101, 102)
COMMON = {"lr": 3e-3, "server_lr": 2.0, "kl_coef": 0.003}  # the best of `tuning`, on average over its first 7 methods
ROUNDS = 16  # [paper]
PREFERENCES = tuple(round(0.1 * i, 1) for i in range(1, 10))  # p₁, of helpful
KL_COEFS = (0.003, 0.01, 0.03)  # of the curves that are compared at equal KL


def seeds_of(n: int) -> range:
    """The n seeds of what is reported, from 10 on: the update was designed on 0 to 9."""
    return range(10, 10 + n)


def with_critic(label: str) -> str:
    """The label of the same method with the critic: `firm β=10` of `firm β=10 groups`."""
    return label.removesuffix(" groups")


def variant(label: str) -> dict:
    """The settings that a label names: `firm β=10 groups` is FIRM at β = 10 with groups of 4 in place of the critic."""
    critic = with_critic(label)
    method, _, beta = critic.partition(" β=")
    found = {"method": method} | ({"beta": float(beta)} if beta else {})
    return found | ({"advantages": "group"} if label != critic else {})


VARIANTS = {
    label: variant(label) for label in ("firm", "firm β=1", *(method for method in COMPARED if method != "firm"))
}
VARIANTS["soups"]["preferences"] = [0.5]  # p₁ of what is evaluated


def tuning_jobs(lab: Lab) -> list[dict]:
    """Every method at every point of the grid, on the tuning seeds; one run each in miniature."""
    grid = [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]
    trials = [setting | {"seed": s} for setting in grid for s in TUNING_SEEDS]
    return [VARIANTS[method] | trial for method in COMPARED for trial in (trials[:1] if lab.quick else trials)]


def ranking(rows: list[dict]) -> list[tuple[float, dict]]:
    """(mean worst gain over the seeds, setting), best first."""
    values = dict.fromkeys(tuple(row[name] for name in GRID) for row in rows)
    settings = [dict(zip(GRID, v, strict=True)) for v in values]
    scored = [(float(np.mean(column(where(rows, **setting), "worst_gain"))), setting) for setting in settings]
    return sorted(scored, key=lambda pair: -pair[0])


def best_setting(lab: Lab, method: str) -> dict:
    """The best of one method's grid. Runs the tuning first where that is missing."""
    return ranking(where(lab.rows("tuning", tuning_jobs(lab)), method=method))[0][1]


def at_common_setting(lab: Lab, name: str, n_seeds: int, variants: dict[tuple, dict]) -> dict[tuple, list[dict]]:
    """Rows of FIRM at the common setting with each variant's changes (of the method, perhaps), on n seeds from 10."""
    firm, seeds = {"method": "firm"} | COMMON, lab.some(seeds_of(n_seeds))
    jobs = {label: [firm | {"seed": s} | changes for s in seeds] for label, changes in variants.items()}
    return lab.groups(name, jobs)
