"""Clients that run elsewhere, by Flower (`flwr`). docs/nodes.md has the commands. [ours]

`server` is `run.train` on a federation whose local runs happen at nodes; `client` is `firm.contribution` on the prompts
that a node holds. The settings are the server's, but for those in OWN. A row says in its column --split whose it is, a
number from 0; rows without one are held out. Flower starts a process for every message:

    query.calibrate   settings, hashes                        -> each client's n_c and calibration sums
    train             likewise, θ, κ, t, a client's number    -> its upload

A message has at most one array, and values as `ranks.packed` writes them. What a client keeps stays in the node's
folder `state`, under marks that the server draws and gives back, so that a node or the server may be killed. A client
that does not answer in time is left out of the round.

Flower's local differential privacy (`clip`, `noise`) and SecAgg+ (`secure`, app/secagg.py) are for θ: the numbers
beside it go up as they are. Left out on purpose: methods that ask clients before their local runs, --client_objectives
by task, --diagnostics, --personal_rounds.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from secrets import randbits
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from app import options
from app.files import write_tensors
from app.ranks import packed, unpacked
from app.session import Session
from clients import Client, Contribution
from fedavg import FEDAVG, Upload
from firm import Federation, contribution
from methods import PREDICTOR
from rewards import Calibration, combine_sums
from run import train as run_train
from settings import Config

if version("flwr") != "1.42.0":  # app/secagg.py uses parts that Flower calls legacy
    raise ImportError(f"flwr {version('flwr')} is not 1.42.0; pip install -r requirements-nodes.txt")
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp import Grid, ServerApp

from app import secagg

OWN = {"prompts", "model", "objectives", "device", "threads"}  # settings that a node may give in its --node-config
PROMPTS = ("the clients' prompts", "the held-out prompts")  # hashes that differ
DELTA = 1e-5  # of differential privacy
Letter = tuple[dict[str, Any], Tensor | None]  # values and array of a message


class Misfit(ValueError):
    """What the server is told of a node; other errors may quote prompts."""


def sealed(values: dict[str, Any], theta: Tensor | None = None) -> RecordDict:
    """What a message carries, under the names that Flower's SecAgg+ looks for."""
    content = RecordDict({"fitins.config": ConfigRecord({"values": packed(values)})})
    if theta is not None:
        content["fitins.parameters"] = ArrayRecord({"0": Array(theta.cpu().numpy())})  # .npy bytes without pickles
    return content


def opened(content: RecordDict) -> Letter:
    """What `sealed` was given. Raises ValueError for another program's message."""
    try:
        array = content.get("fitins.parameters")
        return unpacked(content["fitins.config"]["values"]), array and torch.from_numpy(array["0"].numpy())
    except Exception as error:  # whatever a stranger sent
        raise Misfit(f"message: {error!r} says that it is not app/nodes.py's; use one version everywhere") from None


# ---- a node: every message meets it in a new process -----------------------------------------------------------


def discreet(message: Message, context: Context, call_next: Callable) -> Message:
    """What goes wrong stays in the node's log, but for its kind."""
    try:
        return call_next(message, context)
    except Misfit:
        raise
    except Exception as error:
        print(f"app/nodes.py: error: {error}", file=sys.stderr, flush=True)
        raise RuntimeError(f"{type(error).__name__}; the node's log says what is wrong") from None


client = ClientApp(mods=[discreet])


def session_of(message: Message, context: Context) -> tuple[Session, dict[str, Any]]:
    """The node's part of the federation as a message finds it, and the message's values."""
    sent, theta = opened(message.content)
    settings, hashes = json.loads(sent["common"])
    settings = vars(Config()) | settings
    own = {name: value for name, value in context.node_config.items() if name in OWN}
    own = {name: shlex.split(value) if isinstance(settings[name], list) else value for name, value in own.items()}
    session = Session(Config(**settings | own), progress=False, apart=True)
    for name in sorted(session.inputs.keys() | hashes.keys()):
        if session.inputs.get(name) != hashes.get(name) and name not in PROMPTS:
            raise Misfit(f"{name} differs from the server's; use the same everywhere")
    if theta is not None:
        session.federation.theta = theta.to(session.federation.theta)
        session.policy.adapter.assign(session.federation.theta)
    return session, sent


def protected(message: Message, context: Context, call_next: Callable) -> Message:
    """`train` behind those of Flower's protections that the run's configuration asks for."""
    run = context.run_config
    if run["clip"]:
        # the mod's deviation is sensitivity · √(2 log(1.25 / δ)) / ε, with this ε and δ its second argument
        mod = LocalDpMod(run["clip"], run["clip"] * run["noise"], 1.0, 1.25 / math.e**0.5)
        call_next = partial(mod, call_next=call_next)
    return secagg.masked(message, context, call_next) if run["secure"] else call_next(message, context)


@client.query("calibrate")
def calibrate(message: Message, context: Context) -> Message:
    """What the node's clients have."""
    session, _ = session_of(message, context)
    own = [who for who in session.federation.clients if who.prompts]
    if not own:
        column = session.config.split
        raise Misfit(f"prompts: this node has none with a {column}; start it with --node-config 'prompts=\"FILE\"'")
    reply = {who.index: (len(who.prompts), session.federation.sums(who)) for who in own}
    return Message(sealed(reply), reply_to=message)


@client.train(mods=[protected])
def train(message: Message, context: Context) -> Message:
    """A client's part in a round: `firm.contribution`, of which only the upload leaves."""
    session, sent = session_of(message, context)
    federation, t, c, mark = session.federation, sent["round"], sent["client"], sent["mark"]
    federation.rounds_done, federation.kl_coef = t, sent["kl_coef"]
    federation.calibration, who = Calibration(**sent["calibration"]), federation.clients[c]
    folder = Path(context.node_config.get("state", "state"))
    folder.mkdir(parents=True, exist_ok=True)
    who.state = [load_file(folder / f"client{c}.{kept}.{i}.safetensors") for i, kept in enumerate(sent["after"])]
    ((_, batch, raw),) = federation.batches([who])
    received = {"theta": federation.theta} | sent["message"]
    part = contribution(who, session.policy, batch, raw, received, federation.method, session.config, t)
    for i, state in enumerate(part.state):
        write_tensors(folder / f"client{c}.{mark}.{i}.safetensors", state)
    np.random.seed()  # noqa: NPY002 - Flower's noise is numpy's, which an objective may have seeded
    return Message(sealed(part.upload.numbers, part.upload.tensors["theta"]), reply_to=message)


# ---- the server ------------------------------------------------------------------------------------------------

server = ServerApp()


class Nodes(Federation):
    """A federation whose clients are elsewhere. What a client keeps is here the mark of its files."""

    def __init__(self, *parts: Any, grid: Grid, run: dict[str, Any]) -> None:
        super().__init__(*parts)
        self.grid, self.run, self.patience = grid, run, float(run["patience"])
        self.homes, self.sums_of, self.met = {}, {}, set()  # by client: its node, its sums; nodes that answered
        if self.server.asks_first:
            raise ValueError(f"method: {self.method.name} exchanges twice a round, which nodes do not; use run.py")
        if self.config.diagnostics or self.config.personal_rounds:
            raise ValueError("diagnostics and personal_rounds look into clients, which are elsewhere; use run.py")
        if run["secure"] and self.method.aggregation is not FEDAVG:
            raise ValueError("secure: SecAgg+ weighs clients by their prompts alone; use --aggregation fedavg")
        if run["noise"] and not run["clip"]:
            raise ValueError("noise: it is a multiple of clip, which is 0; set both")

    def meet(self) -> list[int]:
        """Ask new nodes what they hold. Returns the clients that no node holds now."""
        here = set(self.grid.get_node_ids())
        self.met &= here
        new, content = sorted(here - self.met), sealed({"common": self.common})
        for node, reply in zip(new, self.ask([(node, content) for node in new], "query.calibrate"), strict=True):
            if isinstance(reply, str):
                if self.calibration is None:  # before the first round
                    raise ValueError(f"node {node}: {reply}")
                print(f"warning: node {node} is not asked: {reply}", file=sys.stderr)
                continue
            self.met.add(node)
            for c, (n, sums) in reply[0].items():
                self.homes[c], self.sums_of[c], self.clients[c].prompts = node, sums, range(n)
        self.homes = {c: node for c, node in self.homes.items() if node in here}
        if self.run["secure"] and len(set(self.homes.values())) < len(self.homes):
            raise ValueError("secure: two clients at one node, and SecAgg+ hides only nodes; start one for each client")
        return [who.index for who in self.clients if who.index not in self.homes]

    def ask(self, contents: Sequence[tuple[int, RecordDict]], kind: str) -> list[Letter | str]:
        """What each node answers, or why it does not."""
        messages = [Message(x, node, kind, ttl=self.patience, group_id=str(self.rounds_done)) for node, x in contents]
        replies = self.grid.send_and_receive(messages, timeout=self.patience) if messages else []
        answers = {}
        for reply in replies:
            try:
                answer = reply.error.reason if reply.has_error() else opened(reply.content)
            except ValueError as error:
                answer = str(error)
            answers[reply.metadata.reply_to_message_id] = answer
        return [answers.get(m.metadata.message_id, f"no answer in {self.patience:g} s") for m in messages]

    def calibrate(self) -> None:
        """Wait for the nodes of all clients; fix every objective's mean and scale from the sums that they send."""
        until = time.time() + self.patience
        while away := self.meet():
            if time.time() > until:
                raise ValueError(f"nodes: nobody holds client {away[0]} after {self.patience:g} s; start its node")
            time.sleep(1)
        self.calibration = combine_sums([self.sums_of[c] for c in sorted(self.sums_of)])

    def local_runs(self, cohort: Sequence[Client]) -> tuple[dict[str, Tensor], dict[int, Contribution], dict[int, str]]:
        """As `Federation.local_runs`, at the nodes."""
        away, t, arrived, contents = self.meet(), self.rounds_done, {}, {}
        faults = {who.index: "its node is away" for who in cohort if who.index in away}
        message = self.server.broadcast(self, [], faults)
        # a mark is drawn, so that runs which share a folder, or a repeated round, overwrite nothing
        values = {"common": self.common, "round": t, "kl_coef": self.kl_coef, "message": message, "mark": randbits(62)}
        values["calibration"] = vars(self.calibration)
        for who in cohort:
            if who.index not in faults:
                own = {"client": who.index, "after": [int(kept["mark"]) for kept in who.state]}
                contents[who.index] = self.homes[who.index], sealed(values | own, self.theta)
        if self.run["secure"]:
            n = max(len(who.prompts) for who in self.clients)
            reach = self.run["clip"] * (1 + 6 * self.run["noise"]) or 1.0
            answers = secagg.mean_update(self.grid, list(contents.values()), t, self.theta, n, reach, self.patience)
        else:
            answers = self.ask(list(contents.values()), "train")
        for c, answer in zip(contents, answers, strict=True):
            if isinstance(answer, str):
                faults[c] = answer
                continue
            theta = self.theta[None] * math.nan if answer[1] is None else answer[1].to(self.theta)
            upload = Upload({"theta": theta}, answer[0])
            if upload.fault or theta.shape[1:] != self.theta.shape:
                faults[c] = f"{upload.fault or 'theta'} in its upload is not as it should be"
            else:
                arrived[c] = Contribution(upload, [{"mark": torch.tensor(values["mark"])}] * len(answer[1]), None, [])
        return {"theta": self.theta} | message, self.gathered(arrived, faults), faults


def prepared(config: Config, progress: bool, grid: Grid, run: dict[str, Any]) -> Session:
    """The server's session: the held-out prompts, and no client's."""
    if config.split in ("iid", "dirichlet", "files"):
        raise ValueError("split: nodes tell clients apart by a column with their numbers; use --split client")
    session = Session(config, progress, apart=True, kind=partial(Nodes, grid=grid, run=run))
    changed = {name: value for name, value in vars(config).items() if value != getattr(Config(), name)}
    session.federation.common = json.dumps([changed, session.inputs])
    session.inputs.update({name: run[name] for name in ("clip", "noise", "secure")})  # --resume may not change them
    if run["noise"]:
        spent = epsilon(run["noise"], config.rounds)
        print(f"a client's θ in {config.rounds} rounds: ({spent:.3g}, {DELTA:g})-differentially private")
    return session


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The whole run, by the flags in the run's configuration."""
    sys.tracebacklimit = 0  # what is wrong is said in one line
    run = dict(context.run_config)
    config, commands = options.parse(shlex.split(run["flags"]))
    if commands.sweep or commands.compare or config.method == PREDICTOR:
        raise ValueError("flags: nodes do a federation's single run; sweep, compare and pluralllm are run.py's")
    run_train(config, commands.resume and Path(commands.resume), prepare=partial(prepared, grid=grid, run=run))


def epsilon(noise: float, rounds: int) -> float:
    """ε at δ = DELTA of a client whose prompts are others, if `noise` is the deviation over the norm of an update."""
    from dp_accounting import GaussianDpEvent, rdp  # here: it takes its time to import

    # one update in another's place moves by twice that norm at most
    return rdp.RdpAccountant().compose(GaussianDpEvent(noise / 2), rounds).get_epsilon(DELTA)
