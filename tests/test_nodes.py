"""Clients elsewhere: the messages, decoded, and runs over them against the simulation (`app/nodes.py`)."""

import json
import math
import runpy
import shutil
from statistics import NormalDist

import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from app import metrics, nodes, options
from app.session import Session
from worlds import toy

FLAGS = "--rounds 3 --clients 4 --split client --eval_samples 1 --threads 1 --held_out 16 --batch_size 8"
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as Flower does in a process of its own


class Wire:
    """Flower's grid without processes: every message is cut into bytes, kept, and put together again."""

    def __init__(self, folders, **configuration):
        self.folders, self.messages, self.down, self.own = folders, [], set(), {}
        self.states = {node: RecordDict() for node in folders}
        self.configuration = {"patience": 1.0, "clip": 0.0, "noise": 0.0, "secure": False} | configuration

    def get_node_ids(self):
        return list(self.folders)

    def send_and_receive(self, messages, timeout=None):
        return [self.answer(message) for message in messages if message.metadata.dst_node_id not in self.down]

    def answer(self, message):
        message.metadata.__dict__["_message_id"] = message.object_id
        node = message.metadata.dst_node_id
        folder, state = self.folders[node], self.states.setdefault(node, RecordDict())
        own = {"prompts": f"{folder}/prompts.jsonl", "state": f"{folder}/state"} | self.own
        try:
            received = self.through(message)
            received.metadata.__dict__["_message_id"] = message.object_id
            reply = nodes.client(received, Context(1, node, own, state, self.configuration))
        except Exception as error:
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
        reply = self.through(reply)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    def through(self, message):
        contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
        self.messages.append((message.metadata.message_type, bool(message.metadata.reply_to_message_id), contents))
        return inflate_object_from_contents(message.object_id, dict(contents))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of prompts: held-out ones, those of clients 0 and 1, those of clients 2 and 3."""
    root = tmp_path_factory.mktemp("nodes")
    rows = [json.loads(line) for line in toy.prepare()[1].read_text("utf-8").splitlines()[:96]]
    for i, row in enumerate(rows[16:]):
        row["client"], row["half"] = i % 4, i % 4 // 2
    parts = {"server": rows[:16]} | {f"node{k}": [r for r in rows[16:] if r["client"] // 2 == k] for k in (0, 1)}
    for name, part in parts.items():
        (root / name).mkdir()
        (root / name / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [root / name for name in parts]


def config_of(folders, *flags):
    return options.parse([*FLAGS.split(), "--prompts", *(f"{folder}/prompts.jsonl" for folder in folders), *flags])[0]


def served(folders, wire, *flags):
    """A server's session, ready for its first round."""
    session = nodes.prepared(config_of(folders[:1], *flags), False, wire, wire.configuration)
    session.begin()
    return session


@pytest.mark.parametrize("flags", [
    "", "--method fsmgda", "--method adaptive", "--method minimum", "--aggregation accuracy", "--weights hypergradient",
])  # fmt: skip
def test_is_the_simulation(folders, flags):
    simulated = Session(config_of(folders, *flags.split()), False)
    simulated.begin()
    session = served(folders, Wire({7: folders[1], 8: folders[2]}), *flags.split())
    for _ in range(3):
        simulated.federation.round(), session.federation.round()
        assert torch.equal(simulated.federation.theta, session.federation.theta)


def test_only_the_upload_leaves(folders):
    wire = Wire({7: folders[1], 8: folders[2]})
    session = served(folders, wire)
    bill = metrics.bill(session.federation.round())
    for kind, is_reply, contents in wire.messages:
        assert not any(word in content for content in contents.values() for word in (b"bake", b"Human", b"pickle"))
        root = next(name for name, content in contents.items() if content.startswith(b"Message"))
        message = inflate_object_from_contents(root, dict(contents))
        arrays = [array for record in message.content.array_records.values() for array in record.values()]
        assert all(array.stype == "numpy.ndarray" and array.data[:6] == b"\x93NUMPY" for array in arrays)
        if is_reply and kind == "train":
            numbers, theta = nodes.opened(message.content)
            assert len(arrays) == 1 and theta.shape == (1, session.policy.adapter.size)
            assert len(message.content) == 2 and len(message.content["fitins.config"]) == 1
            assert numbers.keys() == {"prompts", "kl"}
        if kind == "train":
            billed = bill["upload_bytes" if is_reply else "download_bytes"]
            assert billed < sum(map(len, contents.values())) < 1.05 * billed


def test_a_node_that_was_away_goes_on_with_what_it_kept(folders):
    wire = Wire({7: folders[1], 8: folders[2]})
    federation = served(folders, wire).federation
    federation.round()
    wire.down = {8}
    record = federation.round()
    assert list(record.arrived) == [0, 1] and "no answer" in record.faults[2]
    wire.folders = {7: folders[1], 9: folders[2]}  # Flower gives a node that starts again another number
    record = federation.round()
    assert list(record.arrived) == [0, 1, 2, 3] and not record.faults
    assert len({int(client.state[0]["mark"]) for client in federation.clients}) == 1
    wire.folders |= {10: folders[0], 11: folders[2]}  # one that holds no client may not stop the run
    for _ in range(2):
        assert list(federation.round().arrived) == [0, 1, 2, 3]
        assert federation.homes == {0: 7, 1: 7, 2: 11, 3: 11}  # of two that hold a client, the one that came last


def test_a_server_that_was_killed_goes_on_to_the_same_end(folders, tmp_path):
    wire = Wire({7: folders[1], 8: folders[2]})
    session = served(folders, wire)
    session.federation.round()
    session.save(tmp_path)
    session.federation.round()  # the nodes keep what they have from a round that the server forgets
    resumed = nodes.prepared(session.config, False, wire, wire.configuration)
    resumed.restore(tmp_path)
    resumed.federation.round()
    assert torch.equal(resumed.federation.theta, session.federation.theta)


@pytest.mark.parametrize("flags, changes, words", [
    ("--method fedcmoo", {}, "fedcmoo exchanges twice"),
    ("", {"noise": 1.0}, "noise: it is a multiple of clip"),
    ("", {"model": "elsewhere"}, "ValueError; the node's log"),
    ("", {"objectives": "py:worlds/toy.py:helpful py:worlds/toy.py:helpful"}, "ValueError; the node's log"),
    ("", {"objectives": "a=py:worlds/toy.py:helpful b=py:worlds/toy.py:harmless"}, "objective a differs"),
    ("", {"prompts": ""}, "this node has none with a client"),
    ("", {"prompts": "SERVER"}, "this node has none with a client"),
])  # fmt: skip
def test_one_line(folders, flags, changes, words):
    wire = Wire({7: folders[1], 8: folders[2]}, noise=changes.pop("noise", 0.0))
    wire.own = {k: v.replace("SERVER", f"{folders[0]}/prompts.jsonl") for k, v in changes.items()}
    with pytest.raises(ValueError, match=words) as caught:
        served(folders, wire, *flags.split())
    assert "\n" not in str(caught.value)


def test_another_base_model(folders, tmp_path):
    model = shutil.copytree(toy.prepare()[0], tmp_path / "model")
    (model / "note.txt").write_text("another file, another hash")
    wire = Wire({7: folders[1], 8: folders[2]})
    wire.own = {"model": str(model)}
    with pytest.raises(ValueError, match="the base model differs"):
        served(folders, wire)


def test_a_message_of_others(folders):
    wire = Wire({7: folders[1]})
    for kind, words in (("train", "not app/nodes.py"), ("query.weather", "No query function")):
        reply = wire.answer(Message(RecordDict(), 7, kind))
        assert words in reply.error.reason and "\n" not in reply.error.reason


def test_differential_privacy(folders):
    wire = Wire({7: folders[1], 8: folders[2]}, clip=1e-3, noise=0.0)
    federation = served(folders, wire).federation
    before = federation.theta
    record = federation.round()
    for part in record.arrived.values():
        assert float((part.upload.tensors["theta"] - before).norm()) <= 1.001e-3


def test_the_noise_of_a_client_has_the_stated_deviation_and_is_its_own(folders, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy\ndef seeded(prompts, **_):\n    numpy.random.seed(0)\n    return list(range(len(prompts)))"
    )
    wire = Wire({7: folders[1], 8: folders[2]}, clip=1e-3, noise=10.0)
    federation = served(folders, wire, "--objectives", f"py:{tmp_path}/mine.py:seeded").federation
    before = federation.theta
    noises = torch.cat([part.upload.tensors["theta"] - before for part in federation.round().arrived.values()])
    assert noises.std(1).tolist() == pytest.approx([1e-2] * 4, rel=0.05)  # of 17,408 numbers: ± 0.5 %
    assert (torch.corrcoef(noises) - torch.eye(4)).abs().max() < 0.05


def test_secure_aggregation_gives_the_mean_and_no_clients_upload(folders):
    wire = Wire({7: folders[1], 8: folders[2]}, secure=True)
    flags = "--clients", "2", "--split", "half"
    with pytest.raises(ValueError, match="secure: two clients at one node"):
        served(folders, wire)
    session, plain = served(folders, wire, *flags), Session(config_of(folders, *flags), False)
    plain.begin()
    wire.messages.clear()
    record, expected = session.federation.round(), plain.federation.round()
    assert (session.federation.theta - plain.federation.theta).abs().max() < 1e-6
    assert record.shares.tolist() == expected.shares.tolist()
    uploads = [part.upload.tensors["theta"] for part in expected.arrived.values()]
    for kind, is_reply, contents in wire.messages:
        if is_reply and kind == "train":
            for upload in uploads:
                assert not any(upload.numpy().tobytes()[:64] in content for content in contents.values())


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (4.0, 3), (20.0, 16)])
def test_epsilon_bounds_the_exact_one_of_the_gaussian_mechanism_from_close_above(noise, rounds):
    mu, phi = 2 * rounds**0.5 / noise, NormalDist().cdf

    def delta(epsilon):  # Balle & Wang (2018)
        return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)

    assert delta(nodes.epsilon(noise, rounds)) < nodes.DELTA < delta(0.85 * nodes.epsilon(noise, rounds))


@pytest.mark.parametrize("stage", ["setup", "share_keys", "collect_masked_vectors", "unmask"])
def test_secure_aggregation_survives_the_loss_of_a_node(folders, stage):
    class Losing(Wire):
        def send_and_receive(self, messages, timeout=None):
            content = messages[0].content.get("secaggplus_configs", {})
            if content.get("stage") == stage:
                self.down = {9}
            return super().send_and_receive(messages)

    rows = (folders[1] / "prompts.jsonl").read_text().splitlines() + (
        folders[2] / "prompts.jsonl"
    ).read_text().splitlines()
    parts = {}
    for c in range(3):
        parts[7 + c] = folders[0].parent / f"third{c}"
        parts[7 + c].mkdir(exist_ok=True)
        (parts[7 + c] / "prompts.jsonl").write_text("\n".join(row for row in rows if json.loads(row)["client"] == c))
    record = served(folders, Losing(parts, secure=True), "--clients", "3").federation.round()
    assert list(record.arrived) == [0, 1, 2][: 3 if stage == "unmask" else 2]


def test_what_goes_wrong_at_a_node_tells_no_prompt(folders, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def nan(prompts, **_): return [float('nan')] * len(prompts)")
    wire = Wire({7: folders[1], 8: folders[2]})
    objectives = f"py:{tmp_path}/mine.py:nan"
    with pytest.raises(ValueError, match="ValueError; the node's log says what is wrong") as caught:
        served(folders, wire, "--objectives", objectives)
    assert (
        "Human" not in str(caught.value)
        and "returned nan for client 0 and the prompt 'Human" in capsys.readouterr().err
    )


def test_a_run_goes_on_only_under_the_protection_that_it_began_with(folders, tmp_path):
    session = served(folders, Wire({7: folders[1], 8: folders[2]}, clip=1.0, noise=0.01))
    session.save(tmp_path)
    weaker = Wire({7: folders[1], 8: folders[2]})
    with pytest.raises(ValueError, match="resume: (clip|noise) changed"):
        nodes.prepared(session.config, False, weaker, weaker.configuration).restore(tmp_path)


def test_another_version_of_flower_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.20.0")
    with pytest.raises(ImportError, match="flwr 1.20.0 is not 1.42.0; pip install -r requirements-nodes.txt"):
        runpy.run_path(nodes.__file__)
