"""Flower's SecAgg+ (Bell et al. 2020) around `app/nodes.py`: the server learns the mean of the updates alone. [ours]

Flower has it for its older interface only; this imitates the strategy and the client that it expects. A node is one
party: it masks n_c / max n · (θ_c − θ_t), cut to ±reach and rounded to reach / 2²¹; its numbers go up as they are. At
least half of the nodes, and two, must stay to a round's end.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as legacy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid
from torch import Tensor

from app.ranks import unpacked


class Workflow(SecAggPlusWorkflow):
    """Flower's, mended: it would ask for shares of nodes that were lost before they gave any."""

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: Any) -> bool:
        state.sampled_node_ids = set(state.active_node_ids)
        enough = super().share_keys_stage(grid, context, state)
        state.sampled_node_ids = set(state.active_node_ids)
        return enough


def masked(message: Message, context: Context, call_next: Callable) -> Message:
    """A node's answer in each of SecAgg+'s four exchanges; `call_next` is asked in the third, for the upload."""

    def update(message: Message, context: Context) -> Message:
        content = call_next(message, context).content
        theta, start = (x["fitins.parameters"]["0"].numpy() for x in (content, message.content))
        values = content["fitins.config"]["values"]
        n = int(unpacked(values)["prompts"])
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([theta - start]), n, {"values": values})
        return Message(legacy.fitres_to_recorddict(result, True), reply_to=message)

    return secaggplus_mod(message, context, update)


def mean_update(
    grid: Grid, contents: Sequence[tuple[int, RecordDict]], t: int, theta: Tensor, n: int, reach: float, patience: float
) -> list[tuple[dict, Tensor] | str]:
    """For each node the numbers of its upload, and for all the mean adapter; or why there is none.

    n: the largest n_c. A node that is lost on the way is left out of the mean.
    """
    answers: dict[int, Any] = dict.fromkeys((node for node, _ in contents), "lost in secure aggregation")

    def received(t: int, results: list, failures: list) -> tuple[None, dict]:
        for proxy, result in results:
            (mean,) = map(torch.from_numpy, parameters_to_ndarrays(result.parameters))
            answers[proxy.node_id] = unpacked(result.metrics["values"]), theta + mean.to(theta)
        return None, {}

    asked = [(SimpleNamespace(node_id=node), legacy.recorddict_to_fitins(x, True)) for node, x in contents]
    strategy = SimpleNamespace(configure_fit=lambda *_: asked, aggregate_fit=received)
    manager = SimpleNamespace(num_available=lambda: len(asked))
    context = LegacyContext(Context(0, 0, {}, RecordDict(), {}), strategy=strategy, client_manager=manager)
    context.state[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: t})
    context.state[MAIN_PARAMS_RECORD] = ArrayRecord()
    Workflow(1.0, 0.5, max_weight=float(n), clipping_range=reach, timeout=patience)(grid, context)
    return list(answers.values())
