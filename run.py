"""A whole run: settings in, a trained adapter, tables and pictures out.

    python run.py                             FIRM on the toy world
    python run.py --resume runs/firm-tiny     go on after a crash, same result
    python run.py --sweep … --compare …       many runs (app/sweep.py)
    python run.py --preset pluralllm-tiny     a predictor of preferences (app/predictor.py)
    torchrun --nproc-per-node 2 run.py        clients spread over processes (app/ranks.py)

Every setting is a flag (settings.py, app/options.py). `train(config)` is the whole run as a function: prepare (all that
can be wrong is found here, before any long work), measure the base model on held-out prompts, calibrate the rewards
once, run the rounds, measure again, write the run directory:

    config.json      every setting                       samples.jsonl   held-out prompts, answered before and after
    metrics.jsonl    a line a round                      adapter/        PEFT's format
    summary.json     what came of it                     checkpoint       for --resume
    rewards.png, weights.png (and front.png on the toy world, whose exact Pareto front is known)
    adapters/        with --eval_every: the adapter after every k-th round
    personal/        with --personal_rounds: every client's own adapter, in PEFT's format
    grams/           with --diagnostics: every round's inner products
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from cProfile import Profile
from pathlib import Path
from pstats import Stats
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from tqdm import tqdm

import methods
from app import checkpoint, diagnostics, metrics, options, peft_files, predictor, ranks, report, sweep
from app.files import free_directory, to_json, write_lines, write_tensors, write_text
from app.metrics import Evaluation, clustered
from app.session import Session
from settings import Config
from worlds import toy


def train(
    config: Config, resume: Path | None = None, progress: bool = True, title: str = "", prepare: Callable = Session
) -> dict[str, Any]:
    """One whole run. Returns what summary.json holds, on the first process. With a title it shows only a bar."""
    say = print if progress and not title else lambda *_: None
    method = "" if config.preset.startswith(config.method) else config.method
    name = "-".join(filter(None, (method, config.advantages, config.weights, config.aggregation, config.preset)))
    out = str(free_directory(resume or config.out, name, bool(resume))) if ranks.first() else ""
    out = Path(ranks.exchanged(out)[0])  # the first process's
    if resume:
        say(f"resume: {out} has its objectives from {' '.join(config.objectives)}")  # first, since py: runs a file
    session = ranks.after_first(lambda: prepare(config, progress))
    everywhere = ranks.exchanged(vars(config) | session.inputs)
    for name, value in everywhere[0].items():
        if any(each.get(name) != value for each in everywhere):
            raise ValueError(f"torchrun: the machines differ in {name}; give all the same command and files")
    say(report.header(session, out))
    if ranks.exchanged(checkpoint.there(out))[0]:
        session.restore(out)
        if ranks.first():
            (out / "summary.json").unlink(missing_ok=True)  # a run that has one is complete
        say(f"goes on after round {len(session.lines)}")
    else:
        session.begin()
    if ranks.first():
        write_text(out / "config.json", json.dumps(vars(config), indent=2) + "\n")
        session.save(out)
    ranks.barrier()
    try:
        with Profile() if config.profile else nullcontext() as profile:
            after = do_rounds(session, out, title)
        after = after or session.evaluate("trained model")
        personal = session.personalised(out) if config.personal_rounds and config.rounds else []
    except BaseException:
        say(f"\nwhat is done is kept; python run.py --resume {out} goes on from there")
        raise
    if not ranks.first():
        return {}
    summary = report.summarise(session, after)
    held_out = session.scores_after | {config.rounds: after.scores}
    best = metrics.best_round(held_out, session.before.scores, session.federation.calibration)
    gains = best and {name: clustered(best[1][..., j]) for j, name in enumerate(session.names)}
    summary["best"] = best and {"round": best[0], "gain": gains}
    if personal or (session.federation.method.needs_primary and all(session.prompts_of)):
        summary["by_client"] = report.by_client(session, after, personal)
    samples = report.samples(session, after)
    write_results(session, summary, samples, out)
    say(report.table(session, summary) + "\n" + report.show_samples(samples))
    if profile:
        Stats(profile).sort_stats("cumulative").print_stats(str(Path(__file__).parent), 25)  # our own functions
        gpu = torch.cuda.max_memory_allocated() / 2**30
        say(f"peak memory {getrusage(RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, of a GPU {gpu:.2f} GiB")
    say(f"{out}: adapter/ (PEFT format), samples.jsonl, metrics.jsonl, summary.json, pictures")
    return summary


def do_rounds(session: Session, out: Path, title: str) -> Evaluation | None:
    """Run and log the rounds that are left. Returns the last round's evaluation if --eval_every asked for one."""
    config, after = session.config, None
    shown = {"desc": title or "round", "disable": not session.progress, "dynamic_ncols": True}
    done = len(session.lines)
    with tqdm(range(done, config.rounds), initial=done, total=config.rounds, **shown) as bar:
        for t in bar:
            after, line = do_round(session, out, t)
            keys = [f"{kind}/{name}" for kind in ("reward", "lambda") for name in session.names]
            bar.set_postfix_str("  ".join(f"{key} {line[key]:.2f}" for key in ["kl", *keys] if key in line))
    return after


def do_round(session: Session, out: Path, t: int) -> tuple[Evaluation | None, dict[str, Any]]:
    """Run, log and save round t. Returns the evaluation of its adapter, if one is due, and its line."""
    config, federation, adapter = session.config, session.federation, session.policy.adapter
    started = time.perf_counter()
    record = federation.round()
    due = config.eval_every and (t + 1) % config.eval_every == 0
    after = session.evaluate(f"after round {t + 1}") if due else None
    line = metrics.line(record, federation.clients, session.names)
    line["seconds"] = time.perf_counter() - started
    if after:
        session.scores_after[t + 1] = after.scores
        line["held_out_kl"] = float(after.kl.mean())
        for j, name in enumerate(session.names):
            score = clustered(after.scores[..., j])
            line |= {f"held_out/{name}": score["mean"], f"held_out_error/{name}": score["standard_error"]}
    if config.diagnostics:
        figures, grams = diagnostics.observe(session.policy, record, config)
        line |= figures
    session.lines.append(line)
    if ranks.first():
        if after:
            peft_files.save(adapter, out / "adapters" / f"round{t + 1:04d}", session.base_model)
        if config.diagnostics:
            (out / "grams").mkdir(exist_ok=True)
            write_tensors(out / "grams" / f"{t:04d}.safetensors", grams)
        session.save(out)
        for client, fault in record.faults.items():
            tqdm.write(f"warning: round {t}: client {client} is left out: {fault}", file=sys.stderr)
    return after, line


def write_results(session: Session, summary: dict[str, Any], samples: list, out: Path) -> None:
    """The adapter, the samples, the pictures, and last summary.json: a run that has one is complete."""
    from app import plots  # here: matplotlib takes its time to import

    peft_files.save(session.policy.adapter, out / "adapter", session.base_model)
    write_lines(out / "samples.jsonl", samples)
    if session.lines:
        plots.by_round(session.lines, session.names, out)
    if options.front_is_known(session.config):
        front = toy.pareto_front([line["prompt"] for line in samples])
        plots.trade_off({session.config.method: [summary]}, front, session.names, out / "front.png")
    write_text(out / "summary.json", to_json(summary, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status; bad input ends with one line."""
    try:
        config, commands = options.parse(sys.argv[1:] if arguments is None else arguments)
        resume = Path(commands.resume) if commands.resume else None
        ranks.join()
        if ranks.size() > 1 and (commands.sweep or commands.compare or config.method == methods.PREDICTOR):
            raise ValueError("torchrun: --sweep, --compare and pluralllm run in one process; start them with python")
        if config.method == methods.PREDICTOR:
            print(report.predictor_table(predictor.train(config, resume)))
        elif commands.sweep or commands.compare:
            sweep.sweep(config, commands.sweep, commands.compare, train)
        else:
            train(config, resume)
    except (ValueError, OSError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
