"""Random bad settings, checkpoints, models, adapters, data and reward functions: one line of ours, or handled.

`EXAMPLES=500 python -m pytest tests/test_hostile.py` asks for as many in all; the suite takes fewer.
"""

import contextlib
import gzip
import io
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import safetensors.torch
import test_run
import torch
from conftest import make_model
from test_run import command

import run
from app.fields import fits
from lora import LoRAConfig, inject
from settings import PREDICTOR_ONLY, SETTINGS, Config

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis (requirements-dev.txt)")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

world, finished = test_run.world, test_run.finished  # the fixtures

KINDS = 7  # tests below
examples = settings(
    max_examples=math.ceil(int(os.environ.get("EXAMPLES", 28)) / KINDS), deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate],
)  # fmt: skip
TEXTS = ["", " ", "x", "nan", "inf", "-inf", "-1", "0", "1", "2", "0.5", "1.5", "1e308", "1e-308", "1e30", "None", "[]",
         "true", "/", "..", "/dev/null", "no/such/place", "a=b", "a:b:c", "\ud800", "\x00", "ж" * 300]  # fmt: skip
VALUES = [None, True, False, -1, 0, 1, 2, 3, 0.5, 1e308, -1e-308, math.nan, math.inf, 2**63, 10**400, "", "x", "1",
          "\ud800", [], [1, "a"], [[]], {}, {"a": None}]  # fmt: skip
TOO_LONG = {
    "rounds",
    "personal_rounds",
    "out",
    "resume",
    "sweep",
    "compare",
    "opinions",
    "encoder",
}  # or not of this run
TYPES = {name: hint for group in SETTINGS.values() for name, hint in get_type_hints(group).items()}
FLAGS = sorted(TYPES.keys() - TOO_LONG - PREDICTOR_ONLY)
EXTREMES = {int: ["1", "2", "3", "7"], float: ["0", "1e-30", "1e-8", "0.5", "1", "2", "1e8", "1e30"]}  # and allowed


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below, but for the lock."""
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file() and p.name != ".lock"}


def ends_well(arguments: list[str], out: Path) -> int:
    """Run the command and check its end: status 0 with finite figures, or status 2 with one line of our own."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = run.main(arguments)
        except SystemExit as end:  # bad usage
            status = end.code
    said = [line for line in re.split(r"[\r\n]+", printed.getvalue()) if line.startswith("run.py: error:")]
    assert status in (0, 2), printed.getvalue()
    assert "Traceback" not in printed.getvalue()
    if status == 2:
        assert len(said) == 1 and len(said[0]) > 30, printed.getvalue()
        return status
    assert not said
    summary = json.loads((out / "summary.json").read_text())
    figures = [summary["kl"]["mean"]] + [
        o[s]["mean"] for o in summary["objectives"].values() for s in ("before", "after")
    ]
    assert all(figure is not None and math.isfinite(figure) for figure in figures), summary
    for line in (out / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            assert value is not None or not name.startswith(("reward", "kl", "lambda")), name
    adapter = safetensors.torch.load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    return status


@contextlib.contextmanager
def scratch():
    """A directory of one example's own."""
    with tempfile.TemporaryDirectory() as root:
        yield Path(root)


def spoiled(values: Any, draw) -> Any:
    """JSON values with a few of them replaced, left out, or put too deep."""
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(values, dict) or not values:
            break
        name = draw(st.sampled_from(sorted(values)))
        how = draw(st.sampled_from(["replace", "replace", "leave out", "rename", "all"]))
        if how == "replace":
            values[name] = draw(st.sampled_from(VALUES))
        elif how == "all":
            values = draw(st.sampled_from(VALUES))
        else:
            old = values.pop(name)
            values |= {} if how == "leave out" else {f"{name}_": old}
    return values


def damaged(data: bytes, draw) -> bytes:
    """Bytes with some flipped, cut off, doubled, or put in front."""
    how, at = draw(st.sampled_from(["flip", "flip", "cut", "twice", "prefix", "empty"])), draw(st.integers(0, 2**20))
    at %= max(len(data), 1)
    if how == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    return {"cut": data[:at], "twice": data + data, "prefix": b"\xff" + data, "empty": b""}[how]


def spoil_tensors(file: Path, draw) -> None:
    """A safetensors file with a tensor left out, renamed, cut, of another type, or not finite."""
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    name = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(["leave out", "rename", "cut", "int", "half", "nan", "inf", "huge", "scalar"]))
    tensor = tensors.pop(name)
    changed = {
        "cut": lambda: tensor[:1].clone(), "int": lambda: tensor.int(), "half": lambda: tensor.half(),
        "nan": lambda: tensor.float() * math.nan, "inf": lambda: tensor.float() + math.inf,
        "huge": lambda: tensor.float() * 1e30, "scalar": lambda: torch.zeros(()),
    }  # fmt: skip
    if how in changed:
        tensors[name] = changed[how]()
    elif how == "rename":
        tensors["renamed." + name] = tensor
    safetensors.torch.save_file(tensors, file, metadata)


# ---- the seven kinds -------------------------------------------------------------------------------------------


@examples
@given(data=st.data())
def test_settings(world, data):
    with scratch() as root:
        chosen = data.draw(st.lists(st.sampled_from(FLAGS), min_size=1, max_size=2, unique=True))
        pools = {
            name: next((EXTREMES[kind] for kind in EXTREMES if fits(kind(1), TYPES[name])), TEXTS) for name in chosen
        }
        flags = {name: data.draw(st.sampled_from(pools[name]) | st.sampled_from(TEXTS)) for name in chosen}
        ends_well(command(world, **(flags | {"rounds": 1, "out": root / "run"})), root / "run")


@examples
@given(data=st.data())
def test_config_json_of_a_run_that_goes_on(finished, data):
    with scratch() as root:
        out = shutil.copytree(finished, root / "run")
        values = json.loads((out / "config.json").read_text())
        text = json.dumps(spoiled(values, data.draw)).encode()
        (out / "config.json").write_bytes(data.draw(st.sampled_from([text, text, text, damaged(text, data.draw)])))
        before = contents(out)
        if ends_well(["--resume", str(out), *data.draw(st.sampled_from([[], ["--rounds", "3"]]))], out):
            assert contents(out) == before


@examples
@given(data=st.data())
def test_checkpoints(finished, data):
    with scratch() as root:
        out = shutil.copytree(finished, root / "run")
        files = [out / "checkpoint" / name for name in ("state.safetensors", "previous.safetensors")]
        for file in data.draw(st.sampled_from([files[:1], files])):
            if data.draw(st.booleans()):
                file.write_bytes(damaged(file.read_bytes(), data.draw))
            else:
                spoil_tensors(file, data.draw)
        before = contents(out)
        if ends_well(["--resume", str(out)], out):
            assert contents(out) == before


@examples
@given(data=st.data())
def test_models(world, data):
    with scratch() as root:
        model = shutil.copytree(world / "model", root / "model")
        file = data.draw(st.sampled_from(sorted(p for p in model.iterdir() if p.is_file())))
        kind = data.draw(st.sampled_from(["values", "values", "bytes", "gone"]))
        if kind == "gone":
            file.unlink()
        elif kind == "bytes":
            file.write_bytes(damaged(file.read_bytes(), data.draw))
        elif file.suffix == ".safetensors":
            spoil_tensors(file, data.draw)
        elif file.suffix == ".json":
            file.write_text(json.dumps(spoiled(json.loads(file.read_text()), data.draw)))
        ends_well(command(world, model=model, rounds=1, out=root / "run"), root / "run")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    inject(make_model("llama"), LoRAConfig(lora_rank=2)).save(directory, "base")
    return directory


@examples
@given(data=st.data())
def test_adapters(adapter, data):
    with scratch() as root:
        copy = shutil.copytree(adapter, root / "adapter")
        file = data.draw(st.sampled_from(sorted(copy.iterdir())))
        if data.draw(st.booleans()):
            file.write_bytes(damaged(file.read_bytes(), data.draw))
        elif file.suffix == ".json":
            file.write_text(json.dumps(spoiled(json.loads(file.read_text()), data.draw)))
        else:
            spoil_tensors(file, data.draw)
        own = inject(make_model("llama"), LoRAConfig(lora_rank=2))
        before = own.vector()
        try:
            own.load(copy)
            assert own.vector().isfinite().all()
        except ValueError as error:
            assert len(str(error)) > 20 and torch.equal(own.vector(), before)


@examples
@given(data=st.data())
def test_data_files(world, data):
    with scratch() as root:
        rows = list(map(json.loads, gzip.decompress((world / "prompts.jsonl.gz").read_bytes()).decode().splitlines()))
        lines = [json.dumps(row) for row in rows]
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(lines) - 1))
            lines[at] = data.draw(st.sampled_from([
                json.dumps(spoiled(rows[at % len(rows)], data.draw)), json.dumps(data.draw(st.sampled_from(VALUES))),
                json.dumps({"chosen": data.draw(st.text(max_size=40))}), data.draw(st.text(max_size=20)),
                "[" * 5000, "{" + lines[at],
            ]))  # fmt: skip
        raw = "\n".join(lines).encode("utf-8", "surrogatepass")
        if data.draw(st.booleans()):
            raw = damaged(raw, data.draw)
        name = data.draw(st.sampled_from(["p.jsonl", "p.jsonl.gz", "p"]))
        (root / name).write_bytes(gzip.compress(raw) if data.draw(st.booleans()) else raw)
        ends_well(command(world, prompts=root / name, rounds=1, out=root / "run"), root / "run")


RETURNS = ["None", "1", "[]", "[1.0]", "completions", "[None] * n", "['1'] * n", "[float('nan')] * n", "[1e308] * n",
           "[10**400] * n", "[1e200 * (-1) ** i for i in range(n)]",
           "{i: 1.0 for i in range(n)}", "(i for i in range(9))",
           "[[1.0]] * n", "torch.zeros(n)", "torch.zeros(n, 1)", "torch.tensor(1.0)", "np.zeros(n)", "[True] * n",
           "[1e8 + i for i in range(n)]", "[1j] * n", "'1' * n", "b'1' * n", "range(n)", "exit()", "1 / 0", "f",
           "completions.clear() or [0.0] * n", "[1e-320 * i for i in range(n)]", "[0.0] * n"]  # fmt: skip


@examples
@given(data=st.data())
def test_reward_functions(world, data):
    with scratch() as root:
        takes = data.draw(
            st.sampled_from(["completions, **_", "**_", "completions", "prompts, completions, missing, **_"])
        )
        value = data.draw(st.sampled_from(RETURNS))
        body = f"import numpy as np, torch\ndef f({takes}):\n    n = len(completions)\n    return {value}\n"
        (root / f"mine{abs(hash(body))}.py").write_text(body)
        mine = f"py:{next(root.glob('mine*'))}:f"
        flags = {"objectives": [mine, "rule:length"], "rounds": 1, "out": root / "run"}
        ends_well(command(world, **flags), root / "run")


def test_every_flag_that_is_not_tried_is_one_of_this_list():
    assert set(FLAGS) | TOO_LONG | PREDICTOR_ONLY >= Config.from_flat({}).flat().keys()
