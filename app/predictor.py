"""The preference predictor as a run, as saved files, and as a reward. [ours]

    python run.py --preset pluralllm-tiny                                      on the survey world
    python run.py --preset pluralllm --opinions FILE --encoder DIR_OR_HUB      on GlobalOpinionQA

A run trains it federated and, beside that, with all groups in one place. Both sides take equally many steps; a central
step goes over all groups. The run directory holds what `run.py`'s does, curves.png, and predictor/:

    predictor.safetensors     the federated side's weights
    predictor.json            its width, its encoder, and every group's context: questions, and the group's answers

The contexts leave their groups: a reward brings them to every client, once (summary.json's `context_bytes` each).
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

import pluralllm
from app import checkpoint
from app.files import free_directory, read_json, to_json, write_lines, write_tensors, write_text
from app.loading import fingerprint, pretrained
from app.options import PRESETS
from pluralllm import Predictor, PredictorFederation, Question, Survey
from settings import Config
from worlds import opinions, survey, tiny_llama
from worlds.opinions import Encoder, GroupPredictor
from worlds.rows import rows_of


def embedded(questions: Sequence[Question], encoder: str, device: str = "cpu", progress: bool = True) -> Tensor:
    """The embeddings of the questions' options: from the cache, keyed by the encoder's files and the texts, or new."""
    name = fingerprint(encoder) if Path(encoder).is_dir() else encoder
    about = {"encoder": name, "questions": [(question.text, question.options) for question in questions]}

    def fill(directory: Path) -> None:
        bar = partial(tqdm, desc="embeddings, once", disable=not progress, leave=False)
        embed = Encoder(*pretrained("AutoModel", encoder, device=device, new_head=True))
        write_tensors(directory / "x.safetensors", {"x": embed(questions, bar=bar)})

    return safetensors.torch.load_file(tiny_llama.cached(fill, __file__, about) / "x.safetensors", device)["x"]


def save(directory: Path, model: Predictor, encoder: str, data: Survey, seed: int) -> None:
    """Write a predictor and its groups' contexts."""
    directory.mkdir(exist_ok=True)
    write_tensors(directory / "predictor.safetensors", model.state_dict())
    about = {"width": model.width, "encoder": str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder}
    about["groups"] = {group: opinions.context_rows(data, group, seed) for group in data.answers}
    write_text(directory / "predictor.json", json.dumps(about, indent=1) + "\n")


@lru_cache(maxsize=4)  # since the objectives of several groups share one
def load(directory: str, device: str = "cpu") -> GroupPredictor:
    """What `save` wrote."""
    about = read_json(Path(directory, "predictor.json"))
    model = Predictor(about["width"]).to(device)
    model.load_state_dict(safetensors.torch.load_file(Path(directory) / "predictor.safetensors"))
    encoder = Encoder(*pretrained("AutoModel", about["encoder"], device=device, new_head=True))
    return GroupPredictor(model, encoder, about["groups"])


def group_objective(rest: str, device: str = "cpu", dtype: str = "float32") -> tuple[Callable, str]:
    """The reward of `group:PREDICTOR:GROUP`: the predicted share of the option that a response chose, 0 for none."""
    directory, _, group = rest.rpartition(":")
    reward = load(directory, device).reward(group)
    encoder = read_json(Path(directory, "predictor.json"))["encoder"]
    return reward, fingerprint(f"{directory}/predictor.json", f"{directory}/predictor.safetensors", encoder)


def of_the_world(specs: Sequence[str], seed: int, progress: bool = True) -> list[str]:
    """The specs, with the directory of the survey world's own predictor for `survey` in `group:survey:GROUP`.

    That predictor is trained by the settings of pluralllm-tiny, federated only (about a minute), and then cached.
    """
    if not any("group:survey:" in spec for spec in specs):
        return list(specs)
    about = PRESETS["pluralllm-tiny"] | {"seed": seed, "central": False, "eval_every": 0, "device": "cpu"}
    sources = [Path(module.__file__).read_text("utf-8") for module in (pluralllm, opinions, survey)]

    def fill(directory: Path) -> None:
        train(Config(**about, out=str(directory / "run")), progress=progress)

    entry = tiny_llama.cached(fill, __file__, about | {"sources": sources})
    return [spec.replace("group:survey:", f"group:{entry / 'run' / 'predictor'}:") for spec in specs]


def survey_of(config: Config, device: str, progress: bool) -> tuple[Survey, list[str], list[str], str]:
    """(survey, groups that train, groups that are only evaluated, encoder), of a file or of the survey world."""
    if config.opinions and config.encoder:
        file, encoder, world = config.opinions, config.encoder, opinions
    elif config.model == "survey" and not config.opinions:
        bar = partial(tqdm, desc="pre-training, once", disable=not progress, leave=False)
        files, world = survey.prepare(config.seed, progress=bar), survey
        file, encoder = str(files.opinions), config.encoder or str(files.encoder)
    else:
        raise ValueError("opinions: name the survey answers and what embeds them, --opinions FILE --encoder DIR_OR_HUB")
    if len(config.questions) != 2 or not 1 <= config.questions[0] <= config.questions[1]:
        raise ValueError(f"questions: {config.questions} must be two numbers, the least and the most; write 9 90")
    groups, unseen = config.train_groups or list(world.TRAIN_GROUPS), config.unseen_groups or list(world.UNSEEN_GROUPS)
    needed = max(2 * config.questions[0], pluralllm.CONTEXT_QUESTIONS + 1)
    questions, answers = opinions.of_groups(*opinions.read(rows_of(file)), groups + unseen, needed)
    return Survey(questions, embedded(questions, encoder, device, progress), answers), groups, unseen, encoder


def train(config: Config, resume: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """One whole run; resume: the directory to go on with. Returns what summary.json holds."""
    started, threads = time.perf_counter(), torch.get_num_threads()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    data, groups, unseen, encoder = survey_of(config, device, progress)
    sides = {"federated": PredictorFederation(data, [[group] for group in groups], config)}
    if config.central:
        sides["centralised"] = PredictorFederation(data, [groups], replace(config, clients_per_round=None))
    torch.set_num_threads(1)  # more would not pay, and sums would depend on their number
    start = {side: figures_of(scores)["alignment"] for side, scores in scores_of(sides, unseen).items()}
    out = free_directory(str(resume) if resume else config.out, config.preset, resume=bool(resume))
    answers = hashlib.sha256(repr([(q, y.tolist()) for own in data.answers.values() for q, y in own.items()]).encode())
    answers.update(data.embeddings.cpu().numpy().tobytes())
    inputs = {"the answers": answers.hexdigest(), "rounds, over which the rate decays,": config.rounds}
    identity = checkpoint.identity(config, inputs)
    lines = []
    if checkpoint.there(out):
        content = checkpoint.read(out, identity)
        lines, started = content["lines"], started - content["seconds"]
        for side, federation in sides.items():
            federation.restore(content[side])
    write_text(out / "config.json", json.dumps(vars(config), indent=2) + "\n")
    if progress:
        print(f"{len(data.questions)} questions; {len(groups)} groups train, {len(unseen)} are held out; run {out}")
    with tqdm(total=config.rounds, initial=len(lines), desc="round", disable=not progress) as bar:
        while len(lines) < config.rounds:
            lines.append(do_round(sides))
            if len(lines) == config.rounds or (config.eval_every and len(lines) % config.eval_every == 0):
                for side, scores in scores_of(sides, unseen).items():
                    lines[-1] |= {f"{name}/{side}": value for name, value in figures_of(scores).items()}
                content = {"identity": identity, "lines": lines, "seconds": time.perf_counter() - started}
                checkpoint.write(out, content | {side: federation.state() for side, federation in sides.items()})
            bar.update()
    summary = {"encoder": encoder} | summarise(sides, groups, unseen, start, lines)
    summary["seconds"] = time.perf_counter() - started
    save(out / "predictor", sides["federated"].model, encoder, data, config.seed)
    from app import plots  # here: matplotlib takes its time to import

    plots.predictor(lines, start, out)
    write_lines(out / "metrics.jsonl", lines)  # the last checkpoint may have come without it
    write_text(out / "summary.json", to_json(summary, indent=2) + "\n")  # last: a run that has one is complete
    torch.set_num_threads(threads)
    return summary


def do_round(sides: dict[str, PredictorFederation]) -> dict[str, float]:
    """A round of either side, and its line in metrics.jsonl; bytes are those of a client of the federated side."""
    line: dict[str, float] = {}
    for side, federation in sides.items():
        started = time.perf_counter()
        figures = federation.round()
        line |= {f"loss/{side}": figures.pop("loss"), f"seconds/{side}": time.perf_counter() - started}
        line = figures | line  # of equal names the first side's stay
    return line


def scores_of(sides: dict[str, PredictorFederation], groups: list[str]) -> dict[str, Tensor]:
    """The scores [G, Q] of each side as it stands."""
    return {side: pluralllm.alignment(f.survey, f.model, groups, f.config.seed) for side, f in sides.items()}


def figures_of(scores: Tensor) -> dict[str, float]:
    """What scores [G, Q] come to."""
    by_group = scores.nanmean(1)  # [G]
    figures = {"alignment": float(by_group.mean()), "worst": float(by_group.min())}
    return figures | {"fairness": pluralllm.fairness(scores), "jain_over_groups": pluralllm.jain(by_group)}


def summarise(
    sides: dict[str, PredictorFederation], train: list[str], unseen: list[str], start: dict[str, float],
    lines: list[dict],
) -> dict[str, Any]:  # fmt: skip
    """What summary.json holds of the rounds and of the predictors as they stand."""
    federated, groups = sides["federated"], train + unseen
    data, seed, scores = federated.survey, federated.config.seed, scores_of(sides, groups)
    scores |= {"mean answer": pluralllm.guessed(data, groups, train), "uniform": pluralllm.guessed(data, groups)}
    both = ~(scores["federated"] + scores["mean answer"]).isnan()  # [G, Q] where the two can be compared
    by_group = {group: {"unseen": group in unseen, "questions": len(data.answers[group])} for group in groups}
    for i, figures in enumerate(by_group.values()):
        figures |= {name: float(each[i].nanmean()) for name, each in scores.items()}
        figures |= {f"{name}, overlap": float(scores[name][i, both[i]].mean()) for name in ("federated", "mean answer")}
    return {
        "method": "pluralllm", "seed": seed, "rounds": len(lines), "questions": len(data.questions),
        "training_seconds": {side: sum(line[f"seconds/{side}"] for line in lines) for side in sides},
        "upload_bytes_per_client_round": lines[-1]["upload_bytes"] if lines else 0,
        "context_bytes": len(json.dumps(opinions.context_rows(data, groups[0], seed)).encode()),
        "context": pluralllm.context_worth(data, federated.model, unseen, seed),
        "sides": {side: {"start": start[side]} | figures_of(scores[side][len(train) :]) for side in sides},
        "groups": by_group,
    }  # fmt: skip
