"""The run that trains a predictor of preferences, federated and centralised side by side. [ours]

    python run.py --preset pluralllm-tiny                                      on the survey world
    python run.py --preset pluralllm --opinions FILE --encoder DIR_OR_HUB      on GlobalOpinionQA

Both sides take equally many steps, the central one each of them over all groups. A run directory holds config.json,
metrics.jsonl (a line a round), summary.json, checkpoint/, curves.png, groups.png, and predictor/ (`app/predictor.py`).
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import clients
import fedavg
import pluralllm
from app import predictor, quiet_libraries
from app.checkpoint import check_unchanged, has_state, read_state, what_is_fixed, write_state
from app.files import logged, new_directory, owned, to_json, write_text
from app.report import aligned
from pluralllm import PredictorFederation
from settings import PRESETS, Config
from worlds import opinions, survey, tiny_llama


class Training:
    """What a run needs. Raises ValueError where something is wrong with the settings or what they name."""

    def __init__(self, config: Config, progress: bool = True) -> None:
        plural, firm = config.plural, config.firm
        threads = config.run.threads or torch.get_num_threads()
        torch.set_num_threads(threads)
        quiet_libraries()
        device = config.run.device
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.train, self.unseen = list(plural.train_groups), list(plural.unseen_groups)
        self.file, self.encoder = plural.opinions, plural.encoder
        if self.file:
            if not self.encoder:
                raise ValueError("encoder: name the model that embeds the questions, as --encoder DIR_OR_HUB")
            self.train, self.unseen = (
                self.train or list(opinions.TRAIN_GROUPS),
                self.unseen or list(opinions.UNSEEN_GROUPS),
            )
        elif config.run.world == "survey":
            files = survey.prepare(firm.seed, progress=progress)
            self.file, self.encoder = str(files.opinions), self.encoder or str(files.encoder)
            self.train, self.unseen = self.train or list(survey.TRAIN_GROUPS), self.unseen or list(survey.UNSEEN_GROUPS)
        else:
            raise ValueError("opinions: name the file of survey answers, as --opinions FILE; or add --world survey")
        questions, answers = opinions.read(self.file)
        opinions.check_groups("train_groups", self.train, list(answers), self.file)
        opinions.check_groups("unseen_groups", self.unseen, list(answers), self.file)
        if both := set(self.train) & set(self.unseen):
            raise ValueError(f"unseen_groups: {min(both)} is a training group too; leave it out of one of them")
        pluralllm.check_contexts(answers, self.train + self.unseen, plural)
        if (firm.clients_per_round or 1) > len(self.train):
            raise ValueError(f"clients_per_round: {firm.clients_per_round} is more than groups, {len(self.train)}")
        self.survey = opinions.survey_of(
            questions, answers, self.train + self.unseen, self.encoder, self.device, progress=progress
        )
        torch.set_num_threads(1)  # a step is too small for more; the clients take them, one each
        own = [[group] for group in self.train]
        made = {"federated": own, "centralised": [self.train]} if plural.central else {"federated": own}
        self.sides = {
            side: PredictorFederation(
                self.survey, held, firm.rounds, config.client.lr, firm.seed, plural,
                firm.clients_per_round if side == "federated" else None, config.client.max_grad_norm,
                threads if self.device == "cpu" else 1,
            )
            for side, held in made.items()
        }  # fmt: skip
        self.config = config

    def scores(self, side: str, groups: Sequence[str]) -> Tensor:
        """`pluralllm.alignment` of one side, [G, Q]."""
        model = self.sides[side].model
        return pluralllm.alignment(self.survey, model, groups, self.config.plural, self.config.firm.seed)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of what figures depend on beside the settings: embeddings and answers."""
        answers = hashlib.sha256()
        for group, own in self.survey.answers.items():
            answers.update(json.dumps([group, {q: shares.tolist() for q, shares in own.items()}]).encode())
        embeddings = self.survey.embeddings.cpu().numpy().tobytes()
        return {"the answers": answers.hexdigest(), "the embeddings": hashlib.sha256(embeddings).hexdigest()}

    def save(self, directory: Path) -> None:
        """All that --resume needs beside config.json."""
        tensors = {f"{side}.{name}": t for side, f in self.sides.items() for name, t in f.state().items()}
        values = {"rounds_done": self.sides["federated"].rounds_done, "rounds": self.config.firm.rounds}
        write_state(directory, tensors, values | what_is_fixed(self.config, self.fingerprint))

    def restore(self, directory: Path) -> None:
        """Take back what `save` wrote. Raises ValueError where the files are damaged, or of another run."""
        tensors, values = read_state(directory)
        check_unchanged(values, self.config, self.fingerprint)
        if values["rounds"] != self.config.firm.rounds:
            raise ValueError(f"rounds: the learning rate's decay was planned for {values['rounds']}; ask for as many")
        for side, federation in self.sides.items():
            own = {n.removeprefix(f"{side}."): t for n, t in tensors.items() if n.startswith(f"{side}.")}
            federation.restore(own, values["rounds_done"])


def train(config: Config, resume: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """One whole run. Returns what summary.json holds. Raises ValueError on bad input, before any long work."""
    with owned(resume) if resume else new_directory(config.run.out, config.run.preset) as out:
        return train_in(out, config, progress)


def train_in(out: Path, config: Config, progress: bool) -> dict[str, Any]:
    """The same in a directory that is this run's own, and that it goes on from if there is a checkpoint in it."""
    started, plural, rounds, every = time.perf_counter(), config.plural, config.firm.rounds, config.run.eval_every
    say = print if progress else lambda *_: None
    if not (out / "config.json").exists():
        write_text(out / "config.json", json.dumps(config.flat(), indent=2) + "\n")
    training = Training(config, progress)
    say(header(training, out))
    start, lines = {side: average(training.scores(side, training.unseen)) for side in training.sides}, []
    if has_state(out / "checkpoint"):
        training.restore(out / "checkpoint")
        lines = logged(out / "metrics.jsonl", training.sides["federated"].rounds_done)
        say(f"goes on after round {len(lines)}")
    else:
        training.save(out / "checkpoint")
        write_text(out / "metrics.jsonl", "")
    (out / "summary.json").unlink(missing_ok=True)
    try:
        with tqdm(
            range(len(lines), rounds), initial=len(lines), total=rounds, desc="round", disable=not progress
        ) as bar:
            for t in bar:
                evaluated = t + 1 == rounds or (every > 0 and (t + 1) % every == 0)
                lines.append(do_round(training, evaluated))
                if "alignment/federated" in lines[-1]:
                    write_text(out / "metrics.jsonl", "".join(to_json(line) + "\n" for line in lines))
                    training.save(out / "checkpoint")
                    bar.set_postfix_str(f"alignment {lines[-1]['alignment/federated']:.3f}")
    except BaseException:
        say(f"\nkept are the rounds up to the last evaluation; python run.py --resume {out} goes on from there")
        raise
    federation = training.sides["federated"]
    summary = summarise(training, start, lines, time.perf_counter() - started)
    predictor.save(out / "predictor", federation.model, training.encoder, training.survey, plural, config.firm.seed)
    from app import plots  # here: matplotlib takes its time to import

    plots.predictor(lines, start, summary["groups"], list(training.sides), out)
    write_text(out / "summary.json", to_json(summary, indent=2) + "\n")  # last: a run that has one is complete
    say(table(summary))
    say(f"{out}: predictor/, metrics.jsonl, summary.json, pictures")
    return summary


def do_round(training: Training, evaluated: bool) -> dict[str, float]:
    """A round of either side, and its line in metrics.jsonl."""
    line: dict[str, float] = {}
    for side, federation in training.sides.items():
        started = time.perf_counter()
        figures = federation.round()
        line |= {"round": figures["round"], f"loss/{side}": figures["loss"]}
        line[f"seconds/{side}"] = time.perf_counter() - started
        if side == "federated":
            line |= {name: value for name, value in figures.items() if name not in ("round", "loss")}
    if evaluated:
        for side in training.sides:
            scores = training.scores(side, training.unseen)
            line |= {f"alignment/{side}": average(scores), f"worst/{side}": float(pluralllm.by_group(scores).min())}
            line[f"fairness/{side}"] = pluralllm.fairness(scores)
    return line


def average(scores: Tensor) -> float:
    """The alignment score of several groups: each group's, averaged. scores [G, Q]."""
    return float(pluralllm.by_group(scores).mean())


def summarise(training: Training, start: dict[str, float], lines: list[dict], seconds: float) -> dict[str, Any]:
    """What summary.json holds."""
    config, groups = training.config, training.train + training.unseen
    plural, data = config.plural, training.survey
    scores = {side: training.scores(side, groups) for side in training.sides}
    scores |= {
        "uniform": pluralllm.guessed(data, groups),
        "mean answer": pluralllm.guessed(data, groups, training.train),
    }
    found, n = {}, len(training.train)
    for i, group in enumerate(groups):
        held = data.questions_of(group)
        found[group] = {"unseen": group in training.unseen, "questions": len(held)}
        found[group]["targets"] = len(held) - plural.context_questions  # of every draw
        found[group]["points"] = data.points_held(group)
        for side, each in scores.items():
            found[group][side] = float(each[i].nanmean()) if not each[i].isnan().all() else math.nan
        known = ~scores["mean answer"][i].isnan() & ~scores["federated"][i].isnan()
        found[group] |= {"overlap": int(known.sum())}
        found[group]["federated, overlap"] = float(scores["federated"][i, known].mean())
        found[group]["mean answer, overlap"] = float(scores["mean answer"][i, known].mean())
    sides = {}
    for side in training.sides:
        unseen = scores[side][n:]
        sides[side] = {"start": start[side], "alignment": average(unseen)}
        sides[side] |= {"worst": float(pluralllm.by_group(unseen).min()), "fairness": pluralllm.fairness(unseen)}
        sides[side]["jain_over_groups"] = pluralllm.jain(pluralllm.by_group(unseen))
    if len(sides) > 1:
        better = max(figures["alignment"] for figures in sides.values())
        for side, figures in sides.items():
            at = [line["round"] + 1 for line in lines if f"alignment/{side}" in line]
            curve = [line[f"alignment/{side}"] for line in lines if f"alignment/{side}" in line]
            reached = pluralllm.convergence(curve, figures["start"] + 0.95 * (better - figures["start"]))
            figures["rounds_to_converge"] = None if reached is None else at[reached]
    context = predictor.context_rows(data, groups[0], plural, config.firm.seed)
    return {
        "method": pluralllm.NAME, "seed": config.firm.seed, "seconds": seconds, "rounds": config.firm.rounds,
        "training_seconds": {side: sum(line[f"seconds/{side}"] for line in lines) for side in training.sides},
        "parameters": len(training.sides["federated"].theta), "questions": len(data.questions),
        "upload_bytes_per_client_round": lines[-1]["upload_bytes"] if lines else 0,
        "context_bytes": len(json.dumps(context).encode()), "encoder": training.encoder,
        "context": worth_of_context(training),
        "sides": sides, "groups": found,
    }  # fmt: skip


def worth_of_context(training: Training) -> dict[str, dict[str, Any]]:
    """What a group's own answers tell beyond another's: the alignment of unseen groups given 15 questions as the group
    answered them, or as its partner did: the next unseen group, from the list's end round to its beginning, that was
    asked 15 of the same. A group without one is left out.
    """
    data, unseen, plural = training.survey, training.unseen, training.config.plural
    settings, partners = replace(plural, context_questions=15), {}  # of more, two groups hardly have so many in common
    for i, group in enumerate(unseen):
        others = unseen[i + 1 :] + unseen[:i]
        able = [h for h in others if len(data.answers[group].keys() & data.answers[h].keys()) >= 15]
        partners |= {group: able[0]} if able else {}
    found = {group: {"partner": partner} for group, partner in partners.items()}
    model, seed = training.sides["federated"].model, training.config.firm.seed
    for name, swapped in (("own", False), ("other", True)):
        scores = pluralllm.alignment(data, model, list(partners), settings, seed, partners, swapped)
        for group, value in zip(partners, pluralllm.by_group(scores).tolist(), strict=True):
            found[group][name] = value
    return found


def header(training: Training, out: Path) -> str:
    """What is about to run, in a few lines."""
    config, data = training.config, training.survey
    federation = training.sides["federated"]
    return "\n".join([
        f"{pluralllm.NAME} · {training.file}",
        f"  device      {training.device}, seed {config.firm.seed}",
        f"  encoder     {training.encoder}, embeddings of width {data.embeddings.shape[1]}",
        f"  predictor   {len(federation.theta):,} parameters",
        f"  questions   {len(data.questions):,}, {len(data.embeddings):,} options",
        f"  groups      {len(training.train)} train, a client each; {len(training.unseen)} are held out",
        f"  federation  {config.firm.rounds} rounds of {config.plural.local_steps} steps"
        + (", and as many steps with all groups in one place" if "centralised" in training.sides else ""),
        f"  run         {out}",
    ])  # fmt: skip


def table(summary: dict[str, Any]) -> str:
    """The closing table: every group's alignment, then what comes of the unseen ones."""
    sides, guesses = list(summary["sides"]), ("mean answer", "uniform")
    rows = [["", "questions", "targets", *sides, *guesses, "federated | mean answer, on the overlap"]]
    for group, figures in summary["groups"].items():
        name = f"{group} *" if figures["unseen"] else group
        cells = [f"{figures[side]:.3f}" for side in (*sides, *guesses)]
        both = f"{figures['federated, overlap']:.3f} | {figures['mean answer, overlap']:.3f} ({figures['overlap']})"
        rows.append([name, str(figures["questions"]), str(figures["targets"]), *cells, both])
    lines = [
        "",
        "alignment, 1 - Jensen-Shannon distance to a group's answers; * took no part in training",
        *aligned(rows),
    ]
    for side, figures in summary["sides"].items():
        line = (
            f"{side}: unseen groups {figures['start']:.3f} -> {figures['alignment']:.3f}, worst {figures['worst']:.3f}"
        )
        line += f", fairness {figures['fairness']:.3f}"
        if "rounds_to_converge" in figures:
            line += f", converged {'never' if (at := figures['rounds_to_converge']) is None else f'after round {at}'}"
        lines.append(line)
    if contexts := summary["context"].values():
        own, other = (np.mean([each[name] for each in contexts]) for name in ("own", "other"))
        lines.append(
            f"{len(contexts)} unseen groups given some of their own answers {own:.3f}, as another answered {other:.3f}"
        )
    lines.append(
        f"uploads {summary['upload_bytes_per_client_round']:,} bytes per client and round; {summary['seconds']:.0f} s"
    )
    return "\n".join(lines)


def of_the_world(specs: Sequence[str], seed: int, progress: bool = True) -> list[str]:
    """Objectives whose predictor is called `survey` get the directory of the survey world's own one of that seed: from
    the cache, or trained now by the settings of pluralllm-tiny, federated only (about a minute).
    """
    pattern = r"((?:[^=:]*=)?group:)survey:"
    names = [spec[found.end() :] for spec in specs if (found := re.match(pattern, spec))]
    if not names:
        return list(specs)
    known = [*survey.TRAIN_GROUPS, *survey.UNSEEN_GROUPS]
    opinions.check_groups("objectives", names, known + [opinions.slug(group) for group in known], "the survey world")
    about = PRESETS["pluralllm-tiny"] | {"seed": seed, "central": False, "eval_every": 1000, "context_draws": 1}
    modules = (pluralllm, clients, fedavg, predictor, opinions)
    sources = [Path(module.__file__).read_text("utf-8") for module in modules]

    def trained(directory: Path) -> None:
        if progress:
            print("the survey world's predictor is trained first, once")
        threads = torch.get_num_threads()
        train(Config.from_flat(about | {"device": "cpu", "out": str(directory / "run")}), progress=False)
        torch.set_num_threads(threads)

    entry = tiny_llama.cached(trained, survey.__file__, about | {"sources": sources})
    return [re.sub(pattern, rf"\g<1>{entry / 'run' / 'predictor'}:", spec) for spec in specs]
