"""The command line: settings in, a trained adapter, tables and pictures out.

    python run.py                                            FIRM on the embedded world
    python run.py --preset tinyllama                         the paper's setup on one GPU
    python run.py --model DIR --prompts FILE --objectives hf:DIR hf:DIR --out runs/mine
    python run.py --resume runs/firm-tiny                    go on after a crash, same result
    python run.py --sweep 0.1 0.3 0.5 0.7 0.9                a run per preference, the trade-off as a picture (sweep.py)
    python run.py --compare firm linear morlhf soups         methods side by side; with --sweep at every preference

Every setting is a flag (settings.py). `train(config)` is the whole run as a function: prepare (all that can
be wrong is found here, before any long work), measure the base model on held-out prompts, calibrate the rewards once,
run the rounds, measure again, write the run directory:

    config.json      every setting                       samples.jsonl   held-out prompts, answered before and after
    metrics.jsonl    a line a round                      adapter/        PEFT's format
    summary.json     what came of it                     checkpoint/     for --resume
    grams/           the gradients' inner products of every round, so that λ can be solved again under another β
    rewards.png, weights.png (and front.png on the embedded world, whose exact Pareto front is known)

Left out on purpose: experiment trackers (metrics.jsonl is plain), schedules of the learning rate.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import data
import firm
import mgda
import rewards
from app import plots, report, sweep
from app.report import Evaluation, to_json, write
from app.stopwatch import Stopwatch, phase
from data import Prompt
from evidence import diagnostics
from firm import Federation, stream
from rollout import Policy, context_of, load_model
from settings import METHODS, TOY_OBJECTIVES, Config, parse
from worlds import toy


def reserve_directory(wanted: str | None, name: str) -> Path:
    """Make the run's directory, so that no other run can take it: --out, or without it the next free runs/`name`.

    Raises ValueError where an explicit --out holds anything, or cannot be made.
    """
    base = Path("runs") / name
    names = [Path(wanted)] if wanted else [base, *(Path(f"{base}-{n}") for n in range(2, 10_000))]
    for out in names:
        try:
            out.mkdir(parents=True)
            return out
        except FileExistsError as error:
            if wanted and out.is_dir() and not any(out.iterdir()):
                return out
            if wanted:
                go_on = f", or --resume {out}" if (out / "checkpoint").is_dir() else ""
                raise ValueError(f"out: {out} exists and is not empty; name another directory{go_on}") from error
        except OSError as error:
            raise ValueError(f"out: {out} cannot be made ({error.strerror}); name another directory") from error
    raise ValueError("out: every name in runs/ is taken; name a directory")


class Session:
    """Everything a run needs, loaded and checked: `Session(config)` raises ValueError before any long work."""

    def __init__(self, config: Config, progress: bool = True) -> None:
        self.config, self.progress = config, progress
        if config.run.method not in METHODS:
            raise ValueError("method: soups is several runs and no training of its own; add --sweep 0.1 0.5 0.9")
        quiet_libraries()
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        if config.run.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        else:
            self.device = config.run.device
        if not config.run.objectives:
            raise ValueError("objectives: name at least one, as [NAME=]rule:NAME, hf:DIR_OR_HUB or py:FILE.py:FUNCTION")
        names = [rewards.parse_spec(spec)[0] for spec in config.run.objectives]
        p = mgda.preference_vector(config.firm.preference, len(names))
        if config.run.method in sweep.TAKE_NO_PREFERENCE and p.std(correction=0) > 1e-9:
            raise ValueError(f"preference: {config.run.method} takes none; leave it out, or use firm, linear or morlhf")
        embedded = not config.rollout.model
        if not embedded and not config.data.prompts:
            raise ValueError("prompts: name the files that go with --model, as --prompts FILE...")
        for file in config.data.prompts:
            data.locate(file)
        self.objectives = rewards.load_objectives(
            config.run.objectives, self.device, config.run.reward_dtype, config.run.reward_batch_size
        )
        self.names = [objective.name for objective in self.objectives]
        self.base_model, files = config.rollout.model, config.data.prompts
        if embedded:
            checkpoint, prompts_file = toy.prepare(progress=progress)
            self.base_model, files = str(checkpoint), files or [str(prompts_file)]
        model, tokenizer = load_model(self.base_model, config.rollout.dtype, self.device)
        context = context_of(model.config)
        context_room = None if context is None else context - config.rollout.max_new_tokens
        if context_room is not None and context_room < 1:
            raise ValueError(
                f"max_new_tokens: {config.rollout.max_new_tokens} leaves no room in a context of {context}"
            )
        prompts, self.counts = data.load_prompts(
            files, tokenizer, config.data.min_prompt_tokens, config.data.max_prompt_tokens, context_room
        )
        train, self.held_out = data.split_held_out(prompts, config.data.held_out, config.run.seed)
        self.shares = data.split_clients(
            train, config.firm.clients, config.data.split, config.data.dirichlet_alpha, config.run.seed
        )
        self.policy = Policy(model, tokenizer, config.lora, config.rollout, config.run.seed)
        self.calibration: rewards.Calibration | None = None
        self.federation = Federation(
            self.policy, self.shares, self.names, self.score, lambda raw: self.calibration.apply(raw), config.firm,
            config.ppo, config.rollout.max_new_tokens, METHODS[config.run.method](config), config.run.seed,
        )  # fmt: skip

    @phase("score")
    def score(self, prompts: Sequence[Prompt], rollout) -> torch.Tensor:
        """Raw rewards [N, M] of a rollout."""
        texts, ids = self.policy.texts(rollout)
        return rewards.score(self.objectives, prompts, texts, ids)

    def calibrate(self) -> None:
        """Fix mean and scale of every objective, once, from base-policy samples of all clients.

        Each client sends n, Σr and Σr² of one batch; with them everybody's rewards get the same constants.
        """
        federation = self.federation
        prompts, rollout = federation.rollout(federation.clients, 0, firm.CALIBRATION)
        raw = self.score([p for batch in prompts for p in batch], rollout)
        size = self.config.firm.batch_size
        self.calibration = rewards.combine([rewards.calibration_sums(rows) for rows in raw.split(size)])

    def evaluate(self, label: str) -> Evaluation:
        """Answer every held-out prompt `eval_samples` times, from the same uniforms whenever it is called."""
        S, L = self.config.run.eval_samples, self.config.rollout.max_new_tokens
        rows = [(i, p) for i, p in enumerate(self.held_out) for _ in range(S)]
        u = np.concatenate([
            stream(self.config.run.seed, firm.EVALUATION, i).random((S, L)) for i in range(len(self.held_out))
        ])  # fmt: skip
        scores, kl, texts, gap = [], [], [], 0.0
        size = self.config.run.eval_batch_size
        for start in tqdm(range(0, len(rows), size), label, disable=not self.progress, leave=False):
            prompts = [p for _, p in rows[start : start + size]]
            rollout = self.policy.sample([p.token_ids for p in prompts], u[start : start + size])
            scores.append(self.score(prompts, rollout))
            pieces = self.config.ppo.micro_batch_size or self.config.firm.batch_size  # what training has room for
            logp, _, hidden = self.policy.logprobs_in_pieces(rollout, pieces)
            gap = max(gap, diagnostics.logp_gap(rollout.sampled_logp, logp, rollout.mask))
            with self.policy.adapter.disabled():
                _, _, hidden_ref = self.policy.logprobs_in_pieces(rollout, pieces)
            kl.append(self.policy.expected_kl(hidden, hidden_ref, rollout.mask))
            texts += self.policy.texts(rollout)[0]
        if gap > 0.1 and self.config.rollout.dtype == "float32":  # 16 bits round about as much
            print(
                f"warning: log-probs at sampling and in training differ by up to {gap:.2g} nats a token; this model's"
            )
            print("  responses are not drawn from the policy that is trained (see logp_gap in metrics.jsonl)")
        shape = (len(self.held_out), S)
        return Evaluation(torch.cat(scores).view(*shape, -1), torch.cat(kl).cpu().view(shape), texts[::S])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what a restart cannot do without: who holds which prompts, and the base weights (their ends)."""
        digest = hashlib.sha256()
        for share in (*self.shares, self.held_out):
            digest.update(json.dumps([p.token_ids for p in share]).encode())
        for name, weight in self.policy.model.named_parameters():
            if not weight.requires_grad:
                ends = weight.detach().flatten()[[0, weight.numel() // 2, -1]].tolist()
                digest.update(f"{name}{ends}".encode())
        return digest.hexdigest()

    def save_checkpoint(self, directory: Path, before: Evaluation) -> None:
        """All that --resume needs, in one file, so that no crash can leave halves that do not match."""
        directory.mkdir(exist_ok=True)
        tensors, values = self.federation.state()
        tensors = tensors | {"before.scores": before.scores, "before.kl": before.kl}
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        values |= {"calibration": self.calibration.to_dict(), "before_texts": before.texts}
        values["fingerprint"] = self.fingerprint
        file = directory / "state.safetensors"
        safetensors.torch.save_file(tensors, f"{file}.tmp", metadata={"values": json.dumps(values)})
        os.replace(f"{file}.tmp", file)

    def load_checkpoint(self, directory: Path) -> Evaluation:
        """Take back what `save_checkpoint` wrote; returns the evaluation before training."""
        file = directory / "state.safetensors"
        try:
            tensors = safetensors.torch.load_file(file)
            with safetensors.safe_open(file, "pt") as opened:
                values = json.loads(opened.metadata()["values"])
        except safetensors.SafetensorError as error:
            raise ValueError(f"resume: {file} is damaged ({error}); start the run anew") from error
        if values["fingerprint"] != self.fingerprint:
            raise ValueError("resume: the base model or the prompts have changed since; start a new run with --out")
        if values["rounds_done"] > self.config.firm.rounds:
            raise ValueError(f"rounds: {values['rounds_done']} are done already; ask for at least as many")
        self.calibration = rewards.Calibration.from_dict(values.pop("calibration"))
        texts = values.pop("before_texts")
        before = Evaluation(tensors.pop("before.scores"), tensors.pop("before.kl"), texts)
        self.federation.restore(tensors, values)
        return before


def quiet_libraries() -> None:
    """The user sees our lines, not the loading bars of libraries."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def train(config: Config, resume: Path | None = None, progress: bool = True, title: str = "") -> dict:
    """One whole run. Returns what summary.json holds. With a title, all it shows is a bar of that name.

    Raises ValueError on bad input before any long work, and during the run for rewards that are not finite numbers and
    updates that have diverged; rewards.ObjectiveFailed where a user's function raises.
    """
    started = time.perf_counter()
    say = print if progress and not title else lambda *_: None
    out = resume or reserve_directory(config.run.out, f"{config.run.method}-{config.run.preset}")
    try:
        session = Session(config, progress)
        say(report.header(session, out))
        if resume:
            before = session.load_checkpoint(out / "checkpoint")
        else:
            before = session.evaluate("base model")
            session.calibrate()
    except BaseException:
        if not any(out.iterdir()):
            out.rmdir()
        raise
    federation, metrics = session.federation, []
    if resume:
        (out / "summary.json").unlink(missing_ok=True)  # a run that has one is complete
        lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
        metrics = [json.loads(line) for line in lines[: federation.rounds_done]]  # a crash may leave one too many
        say(f"goes on after round {federation.rounds_done}")
    for name, constant in zip(session.names, session.calibration.constant.tolist(), strict=True):
        if constant and progress:
            print(f"warning: {name} gave every response of the base policy the same reward, so it is not scaled;")
            print("  while its gradient is zero, min-norm weights go to it alone, and firm and mgda learn nothing")
    write(out / "metrics.jsonl", "".join(to_json(m) + "\n" for m in metrics))
    session.save_checkpoint(out / "checkpoint", before)
    write(out / "config.json", json.dumps(config.flat(), indent=2) + "\n")

    bar = tqdm(
        total=config.firm.rounds, initial=federation.rounds_done, desc=title or "round", disable=not progress,
        dynamic_ncols=True,
    )  # fmt: skip
    first = federation.rounds_done
    try:
        with Stopwatch() if config.run.profile else nullcontext() as watch:
            while federation.rounds_done < config.firm.rounds:
                metrics.append(federation.round())
                save_grams(out, federation)
                with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(to_json(metrics[-1]) + "\n")
                session.save_checkpoint(out / "checkpoint", before)
                bar.set_postfix_str(report.progress_line(metrics[-1], session.names))
                bar.update()
        bar.close()
        after = session.evaluate("trained model")
    except BaseException:
        say(f"\n{federation.rounds_done} rounds are kept; python run.py --resume {out} goes on from there")
        raise

    session.policy.adapter.save(out / "adapter", session.base_model)
    summary = report.summarise(session, before, after, metrics, time.perf_counter() - started)
    if watch and federation.rounds_done > first:
        summary["profile"] = report.profile(watch, federation.rounds_done - first)
    write(out / "samples.jsonl", report.samples(session, before, after))
    draw(session, before, after, metrics, out)
    write(out / "summary.json", to_json(summary, indent=2) + "\n")  # last, see above
    say(report.table(session, summary))
    say(report.show_samples(session, before, after))
    if "profile" in summary:
        say(report.profile_table(summary["profile"]) + "\n")
    say(f"{out}: adapter/ (PEFT format), samples.jsonl, metrics.jsonl, summary.json, pictures")
    return summary


def save_grams(out: Path, federation: Federation) -> None:
    """grams/NNNN.safetensors, one file per round, float64: the inner products of `monitor.agreement`."""
    file = out / "grams" / f"{federation.rounds_done - 1:04d}.safetensors"
    file.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({name: t.contiguous() for name, t in federation.grams.items()}, f"{file}.tmp")
    os.replace(f"{file}.tmp", file)


def draw(session: Session, before: Evaluation, after: Evaluation, metrics: list[dict], out: Path) -> None:
    """The run's pictures."""
    plots.rewards(metrics, session.names, out / "rewards.png")
    plots.weights(metrics, session.names, out / "weights.png")
    if session.config.run.objectives == TOY_OBJECTIVES and not session.config.rollout.model:
        points = {}
        for label, answers in (("base model", before), (session.config.run.method, after)):
            pairs = [report.clustered(answers.scores[..., j]) for j in range(2)]
            points[label] = tuple(np.array(pairs).T)
        plots.front(toy.pareto_front([p.text for p in session.held_out]), points, session.names, out / "front.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 on bad input, 130 when stopped by the user."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")  # a terminal that has no λ shall not end the run
    config, resume, preferences, methods = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if preferences or methods:
            sweep.sweep(config, preferences, methods, train, Session, reserve_directory)
        else:
            train(config, resume)
    except (ValueError, rewards.ObjectiveFailed) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
