"""A saved predictor of preferences: written, loaded, asked; and the reward made from it. [ours]

    from app import predictor
    saved = predictor.load("runs/pluralllm-tiny/predictor")
    saved.ask("north 1", "what matters most for schools ?", ["family", "faith", "order"])     the share of each option

A directory of two files:

    predictor.safetensors     its weights
    predictor.json            its width, its encoder, and every group's context: questions, and its answers to them

Whoever asks for a group's preferences uses that context, so a group's answers to `context_questions` questions leave
the group: with a reward made from them they reach every client that scores by it, once (`context_bytes` of the run's
summary.json is what one group's come to).
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import clients
import pluralllm
from app.files import write_tensors, write_text
from app.loading import fingerprint_of
from pluralllm import Predictor, Question, Survey
from worlds import opinions

ARCHITECTURE = {
    "dimension": pluralllm.WIDTH, "layers": pluralllm.LAYERS, "heads": pluralllm.HEADS,
    "embedders": pluralllm.EMBEDDERS,
}  # fmt: skip


# ---- a saved one -----------------------------------------------------------------------------------------------


def context_of(data: Survey, group: str, settings: pluralllm.PluralConfig, seed: int) -> list[int]:
    """The questions that a group is known by afterwards: the first context of its evaluation."""
    rng = clients.stream(seed, pluralllm.PREDICTOR_EVALUATION, 0, data.position(group))
    own = data.questions_of(group)
    return [own[j] for j in rng.permutation(len(own))[: settings.context_questions]]


def context_rows(data: Survey, group: str, settings: pluralllm.PluralConfig, seed: int) -> list[dict]:
    """A group's context as it is written down, and as it travels: questions, options, shares."""
    chosen = [(data.questions[q], data.answers[group][q]) for q in context_of(data, group, settings, seed)]
    return [{"question": q.text, "options": q.options, "distribution": y.tolist()} for q, y in chosen]


def save(
    directory: Path, model: Predictor, encoder: str, data: Survey, settings: pluralllm.PluralConfig, seed: int
) -> None:
    """Write a predictor and its groups' contexts."""
    contexts = {group: context_rows(data, group, settings, seed) for group in data.answers}
    where = str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder
    about = {"architecture": ARCHITECTURE, "width": model.width, "encoder": where, "groups": contexts}
    directory.mkdir(exist_ok=True)
    write_tensors(directory / "predictor.safetensors", model.state_dict())
    write_text(directory / "predictor.json", json.dumps(about, indent=1) + "\n")


class SavedPredictor:
    """A predictor with its encoder and its groups' contexts, to be asked."""

    def __init__(self, model: Predictor, encoder: opinions.Encoder, contexts: dict[str, list[dict]]) -> None:
        self.model, self.encoder, self.groups = model, encoder, list(contexts)
        self.contexts = {
            group: (
                encoder(opinions.texts_of([Question(row["question"], tuple(row["options"])) for row in rows])),
                torch.tensor([share for row in rows for share in row["distribution"]]),
            )
            for group, rows in contexts.items()
        }
        self.known: dict[tuple, Tensor] = {}

    def group(self, name: str) -> str:
        """A group by its name or its slug. Raises ValueError for one that it does not know."""
        found = [g for g in self.groups if g == name] or [g for g in self.groups if opinions.slug(g) == name]
        if not found:
            opinions.check_groups("group", [name], self.groups, "the predictor")
        return found[0]

    def ask(self, group: str, question: str, options: Sequence[str]) -> list[float]:
        """The predicted share of the group's people for each option. Raises ValueError for an unknown group."""
        key = (self.group(group), question, tuple(options))
        if key not in self.known:
            x, y = self.contexts[key[0]]
            target = self.encoder(opinions.texts_of([Question(question, tuple(options))]))
            self.known[key] = self.model.shares(x, y, target, torch.zeros(len(options), dtype=torch.long))
        return self.known[key].tolist()


@lru_cache(maxsize=4)
def load(directory: str, encoder: str | None = None) -> SavedPredictor:
    """A predictor that a run saved; encoder: where its encoder lies now, if it has moved.

    Raises ValueError where it is none, or of another architecture or width.
    """
    folder = Path(directory)
    try:
        about = json.loads((folder / "predictor.json").read_text("utf-8"))
        tensors = safetensors.torch.load_file(folder / "predictor.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"predictor: {directory} holds none ({error}); name the predictor/ of a pluralllm run"
        ) from error
    if not isinstance(about, dict) or about.get("architecture") != ARCHITECTURE:
        raise ValueError(f"predictor: {directory} is of another architecture; train it anew")
    try:
        embed, model = opinions.Encoder(encoder or about["encoder"]), Predictor(about["width"])
        if (width := embed.model.config.hidden_size) != model.width:
            raise ValueError(
                f"encoder: it embeds in {width} numbers and the predictor reads {model.width}; name its own"
            )
        model.load_state_dict(tensors)
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError(f"predictor: {directory} has weights that are not finite; train it anew")
        return SavedPredictor(model.eval(), embed, about["groups"])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"predictor: {directory} does not fit its description; train it anew") from error


# ---- the reward made from it -----------------------------------------------------------------------------------


def chosen(response: str, options: Sequence[str]) -> int | None:
    """The position of the option that a response chose: by its text, or by its letter, A for the first; else None."""
    plain = lambda text: re.sub(r"\W+", " ", text).strip().casefold() or text.strip()  # noqa: E731 - "+" stays
    given, texts = plain(response), [plain(option) for option in options]
    if response.strip() in options:
        return list(options).index(response.strip())
    if given and given in texts:
        return texts.index(given)
    lettered = re.match(r"\W*([a-z])\b\W*(.*)", response.strip(), re.IGNORECASE | re.DOTALL)
    if lettered:
        position, rest = ord(lettered[1].lower()) - ord("a"), plain(lettered[2])
        if position < len(options) and rest in ("", texts[position]):
            return position
    return None


def group_objective(predictor: str, group: str) -> tuple[Callable[..., list[float]], str]:
    """The reward of `group:PREDICTOR:GROUP`: the predicted share of the option that a response chose, 0 for none; and a
    hash of the predictor's weights and the group's context.

    Prompts need the columns `question` and `options`. Raises ValueError for an unknown predictor or group.
    """
    saved = load(predictor)
    name = saved.group(group)

    def reward(prompts, completions, question=None, options=None, **columns) -> list[float]:
        if question is None or options is None:
            raise ValueError("a group's reward needs prompts with the columns question and options")
        rewards = []
        for q, o, completion in zip(question, options, completions, strict=True):
            if not isinstance(q, str) or not isinstance(o, (list, tuple)):
                raise ValueError("a group's reward needs a question and its options beside every prompt")
            position = chosen(completion, o)
            rewards.append(0.0 if position is None else saved.ask(name, q, o)[position])
        return rewards

    context = hashlib.sha256(repr([tensor.tolist() for tensor in saved.contexts[name]]).encode()).hexdigest()
    return reward, fingerprint_of(saved.model.named_parameters()) + context
