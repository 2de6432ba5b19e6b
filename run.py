"""The command line: settings in, a trained adapter, tables and pictures out.

    python run.py                                            FIRM on the toy world
    python run.py --preset tinyllama                         the paper's setup on one GPU
    python run.py --model DIR --prompts FILE --objectives hf:DIR hf:DIR --out runs/mine
    python run.py --resume runs/firm-tiny                    go on after a crash, same result
    python run.py --sweep 0.1 0.3 0.5 0.7 0.9                a run per preference: the trade-off (app/sweep.py)
    python run.py --compare firm linear morlhf soups         methods side by side; with --sweep at every preference
    python run.py --preset pluralllm-tiny                    a predictor of preferences (app/predictor_run.py)
    torchrun --nproc-per-node 2 run.py                       clients spread over processes (app/ranks.py)

Every setting is a flag (settings.py). `train(config)` is the whole run as a function: prepare (all that can
be wrong is found here, before any long work), measure the base model on held-out prompts, calibrate the rewards once,
run the rounds, measure again, write the run directory:

    config.json      every setting                       samples.jsonl   held-out prompts, answered before and after
    metrics.jsonl    a line a round                      adapter/        PEFT's format
    summary.json     what came of it                     checkpoint/     for --resume
    rewards.png, weights.png (and front.png on the toy world, whose exact Pareto front is known)
    tasks.png        for methods with a primary objective: its rewards by task, its weights, the clients' shares
    adapters/        with --eval_every: the adapter after every k-th round, and its held-out scores
    personal/        with --personal_rounds: every client's own adapter, in PEFT's format
    grams/           with --diagnostics: every round's inner products, so that λ can be solved again under another β

Left out on purpose: experiment trackers (metrics.jsonl is plain), schedules of the learning rate.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while all this is imported, Ctrl-C ends the program without a word

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import pluralllm
from app import metrics, predictor_run, ranks, report, sweep
from app.checkpoint import has_state
from app.files import logged, new_directory, owned, read_lines, to_json, write_tensors, write_text
from app.program import run_to_the_end
from app.session import Evaluation, Session
from app.stopwatch import Stopwatch, peak_memory
from firm import FIRM, MGDA
from settings import Config, parse
from worlds import toy


def train(config: Config, resume: Path | None = None, progress: bool = True, title: str = "") -> dict[str, Any]:
    """One whole run. Returns what summary.json holds, on the first process. With a title, all it shows is a bar of that
    name.

    Raises ValueError on bad input before any long work, and during the run for rewards that are not finite numbers and
    updates that have diverged; ObjectiveFailed where a user's function raises.
    """
    parts = (config.run.advantages, config.run.weights, config.run.aggregation)
    method = "" if config.run.preset.startswith(config.run.method) else config.run.method  # no fedmoa-fedmoa-tiny
    name = "-".join(filter(None, (method, *parts, config.run.preset)))
    with ExitStack() as stack:
        out = None
        if ranks.first():
            out = stack.enter_context(owned(resume) if resume else new_directory(config.run.out, name))
        summary = train_in(ranks.from_first(out), config, progress, title)
        ranks.from_first(None)  # the others wait for what the first still writes, and hear of it where that fails
        return summary


def train_in(out: Path, config: Config, progress: bool, title: str) -> dict[str, Any]:
    """The same in a directory that is this run's own, and that it goes on from if there is a checkpoint in it."""
    started = time.perf_counter()
    say = print if progress and not title else lambda *_: None
    if ranks.first() and not (out / "config.json").exists():  # first: from here on --resume works
        write_text(out / "config.json", json.dumps(config.flat(), indent=2) + "\n")
    session = ranks.after_first(lambda: Session(config, progress))
    say(report.header(session, out))
    before = begin(session, out)
    federation, first = session.federation, session.federation.rounds_done
    if first:
        say(f"goes on after round {first}")
    try:
        with Stopwatch() if config.run.profile else nullcontext() as watch:
            lines, after = do_rounds(session, before, out, title)
        after = after or session.evaluate("trained model")
        more = config.firm.rounds and config.own["fedmoa"].personal_rounds
        personal = session.personalised(out / "personal") if more else None
    except BaseException:
        say(f"\nwhat is done is kept; python run.py --resume {out} goes on from there")
        raise
    if not ranks.first():
        return {}

    summary = report.summarise(session, before, after, lines, time.perf_counter() - started)
    if personal or config.method.needs_primary:
        summary["clients"] = report.by_client(session, before, after, personal)
    summary["worst_served"] = report.worst_served(session, lines)
    summary["best"] = report.best_round(session, before, after, out / "adapters")
    if watch and federation.rounds_done > first:
        profile = {"rounds": federation.rounds_done - first, "seconds": dict(watch.seconds)}
        summary["profile"] = profile | peak_memory()
    samples = report.samples(session, before, after)
    session.policy.adapter.save(out / "adapter", session.base_model)
    write_text(out / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples))
    draw(session, summary, lines, out)
    write_text(out / "summary.json", to_json(summary, indent=2) + "\n")  # last: a run that has one is complete
    say(report.table(session, summary))
    if "clients" in summary:
        say(report.client_table(session, summary["clients"]))
    say(report.show_samples(session, samples))
    if "profile" in summary:
        say(report.profile(summary["profile"]) + "\n")
    say(f"{out}: adapter/ (PEFT format), samples.jsonl, metrics.jsonl, summary.json, pictures")
    return summary


def begin(session: Session, out: Path) -> Evaluation:
    """The base model measured and the rewards calibrated, or all that taken from the checkpoint if there is one; the
    files that a restart needs. Returns the evaluation before training.
    """
    if has_state(out / "checkpoint"):
        before = session.restore(out / "checkpoint")
        lines = logged(out / "metrics.jsonl", session.federation.rounds_done)
        if ranks.first():
            (out / "summary.json").unlink(missing_ok=True)
    else:
        before, lines = session.begin(), []
    for name, constant in zip(session.names, session.federation.calibration.constant.tolist(), strict=True):
        if constant and session.progress:
            print(f"warning: {name} gave every response of the base policy the same reward, so it is not scaled")
            if session.federation.method.weights in (FIRM.weights, MGDA.weights):
                print("  while its gradient is zero, min-norm weights go to it alone, and nothing is learnt")
    if ranks.first():
        if not lines:
            session.save(out / "checkpoint", before)
        write_text(out / "metrics.jsonl", "".join(to_json(line) + "\n" for line in lines))
        write_text(out / "config.json", json.dumps(session.config.flat(), indent=2) + "\n")  # more rounds, perhaps
    ranks.from_first(None)  # from here on all find the same there
    return before


def do_rounds(
    session: Session, before: Evaluation, out: Path, title: str
) -> tuple[list[dict[str, Any]], Evaluation | None]:
    """The rounds that are left, each with its line in metrics.jsonl and its checkpoint. Returns the lines of all, and
    the evaluation after the last round if --eval_every asked for one.
    """
    federation, rounds = session.federation, session.config.firm.rounds
    lines, held_out, done = read_lines(out / "metrics.jsonl"), None, federation.rounds_done
    shown = {"desc": title or "round", "disable": not session.progress, "dynamic_ncols": True}
    with tqdm(range(done, rounds), initial=done, total=rounds, **shown) as bar:
        for _ in bar:
            record = federation.round()  # holds every client's batch and, with --diagnostics, gradients
            every, t = session.config.run.eval_every, federation.rounds_done
            held_out = session.evaluate(f"after round {t}") if every and t % every == 0 else None
            if not ranks.first():
                del record
                continue
            lines.append(metrics.line(record, session.names, session.policy.adapter))
            if held_out:
                lines[-1] |= report.held_out_figures(session, held_out)
                session.policy.adapter.save(out / "adapters" / f"round{t:04d}", session.base_model)
                kept = {"scores": held_out.scores, "kl": held_out.kl}
                write_tensors(out / "adapters" / f"round{t:04d}" / "held_out.safetensors", kept)
            if session.config.firm.diagnostics:
                from evidence import diagnostics  # here: only --diagnostics needs it

                figures, grams = diagnostics.observe(record)
                lines[-1] |= figures
                (out / "grams").mkdir(exist_ok=True)
                write_tensors(out / "grams" / f"{record.number:04d}.safetensors", grams)
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(to_json(lines[-1]) + "\n")
            session.save(out / "checkpoint", before)
            for client, fault in record.faults.items() if session.progress else ():
                tqdm.write(f"warning: round {record.number}: client {client} is left out: {fault}", file=sys.stderr)
            del record  # before the next round makes its own
            bar.set_postfix_str(report.progress_line(lines[-1], session.names))
    return lines, held_out


def draw(session: Session, summary: dict[str, Any], lines: list[dict[str, Any]], out: Path) -> None:
    """The run's pictures, from the lines of metrics.jsonl and the summary."""
    from app import plots  # here: matplotlib takes its time to import

    if lines:
        plots.by_round(lines, session.names, out)
    if lines and session.federation.method.needs_primary:
        plots.by_task(lines, session.names[session.primary], session.tasks, out)
    if session.config.front_is_known:
        points = {}
        for label, stage in (("base model", "before"), (session.config.run.method, "after")):
            figures = [objective[stage] for objective in summary["objectives"].values()]
            points[label] = tuple(np.array([f[key] for f in figures]) for key in ("mean", "standard_error"))
        plots.front(toy.pareto_front([p.text for p in session.held_out]), points, session.names, out / "front.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `run_to_the_end` does."""
    ranks.join()
    config, resume, preferences, methods = parse(sys.argv[1:] if arguments is None else arguments)

    def work() -> None:
        if ranks.size() > 1 and (preferences or methods or config.run.method == pluralllm.NAME):
            raise ValueError("torchrun: --sweep, --compare and pluralllm run in one process; start them with python")
        if config.run.method == pluralllm.NAME:
            if preferences or methods:
                raise ValueError(f"method: {pluralllm.NAME} trains no policy; leave --sweep and --compare out")
            predictor_run.train(config, resume)
        elif preferences or methods:
            sweep.sweep(config, preferences, methods, train)
        else:
            train(config, resume)

    return run_to_the_end("run.py", work)


if __name__ == "__main__":
    sys.exit(main())
