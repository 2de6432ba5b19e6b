"""What differential privacy costs in reward: app/nodes.py with Flower's mechanism, messages in one process. [ours]

It needs requirements-nodes.txt. Every client is a node, on the toy world. ε is of a client's adapters in all rounds.
"""

import math
from functools import partial
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import run
from app import nodes
from app.files import write_lines
from app.options import PRESETS
from experiments.lab import COMMON, Experiment, seeds
from experiments.tables import Row
from experiments.toy import outcome
from settings import Config
from worlds import toy


class Loopback:
    """Flower's grid without a network. homes: each node's folder."""

    def __init__(self, homes: dict[int, Path], configuration: dict) -> None:
        self.homes, self.configuration = homes, configuration

    def get_node_ids(self) -> list[int]:
        return list(self.homes)

    def send_and_receive(self, messages: list, timeout: float | None = None) -> list:
        replies = []
        for message in messages:
            home = self.homes[message.metadata.dst_node_id]
            message.metadata.__dict__["_message_id"] = message.object_id
            own = {"prompts": str(home / "prompts.jsonl"), "state": str(home)}
            replies.append(nodes.client(message, Context(1, 1, own, RecordDict(), self.configuration)))
        return replies


def measure(job: dict, directory: Path) -> list[Row]:
    """Train over nodes: gains, the KL, ε."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as Flower does in a process of its own
    homes = {node: directory / f"node{node}" for node in range(job["clients"] + 1)}  # 0: the server's
    rows: dict[int, list] = {node: [] for node in homes}
    for i, row in enumerate(toy.hh_rows()):
        client = (i + i // 32) % job["clients"]
        rows[client + 1 if i % 32 else 0].append(row | ({"client": client} if i % 32 else {}))
    for node, home in homes.items():
        home.mkdir()
        write_lines(home / "prompts.jsonl", rows[node])
    prompts = [str(homes.pop(0) / "prompts.jsonl")]
    asked = {"patience": 60.0, "secure": False} | {name: job[name] for name in ("clip", "noise")}
    settings = {name: value for name, value in job.items() if name not in asked}
    config = Config(**PRESETS["tiny"] | settings | {"prompts": prompts, "out": str(directory / "run")})
    prepare = partial(nodes.prepared, grid=Loopback(homes, asked), run=asked)
    row = outcome(config, run.train(config, progress=False, prepare=prepare))
    if job["noise"]:
        row["epsilon"] = nodes.epsilon(job["noise"], config.rounds)
        row["log_10_epsilon"] = math.log10(row["epsilon"])
    return [row]


EXPERIMENTS = {
    "privacy": Experiment(
        measure, {f"{clients} clients @ noise {noise:g}": COMMON | {
            "rounds": 5, "split": "client", "held_out": 64, "clients": clients, "clip": 0.5, "noise": noise}
         for clients in (4, 32) for noise in (0.0, 0.03, 0.1, 0.3)},
        seeds(3), ["epsilon", "worst_gain", "gain_helpful", "gain_harmless", "kl"],
        drawn=("log_10_epsilon", "worst_gain"),
        note="5 rounds; the norm of an update is cut to 0.5, and noise of deviation 0.5 · noise goes on every number.",
    ),
}  # fmt: skip
