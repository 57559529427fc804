"""What workers say of decided turns, on its way to `/metrics` and to the requests that asked for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request

from vllm_reroute.metrics.counting import RoutingCounts
from vllm_reroute.plan.decided_turn import DecidedTurn, together


class DecidedTurns:
    """Takes what a step has decided, and hands it on with the request's next output.

    It leaves in `EngineCoreOutput.routed_experts`, vLLM's field for an array that says how tokens
    were routed: front ends join a request's arrays along the first axis, here its visual tokens, and
    show them when it ends. No routed model has experts.

    requests: the scheduler's live requests, by id.
    """

    def __init__(self, requests: Collection[str], counts: RoutingCounts) -> None:
        self._requests, self._counts = requests, counts
        self._ends: dict[str, int] = {}
        self._told: dict[str, list[np.ndarray]] = {}

    def take(self, turns: Mapping[str, DecidedTurn]) -> None:
        """What a step has decided. What a request decides again after a preemption is known."""
        for request_id, turn in turns.items():
            if request_id in self._requests and turn.end > self._ends.get(request_id, 0):
                self._ends[request_id] = turn.end
                self._counts.brought_back(turn.brought_back)
                if turn.told is not None:
                    told = self._told.setdefault(request_id, [])
                    if turn.ranks_earlier:
                        told[:] = [together(np.concatenate(told), turn.told)]
                    else:
                        told.append(turn.told)

    def tell(self, outputs: Mapping[int, EngineCoreOutputs]) -> None:
        """Let what is known travel with the outputs of a step."""
        if not self._told:
            return
        for of_client in outputs.values():
            for output in of_client.outputs:
                told = self._told.pop(output.request_id, None)
                if told is not None:
                    output.routed_experts = np.concatenate(told)
        self._told = {name: told for name, told in self._told.items() if name in self._requests}

    def forget(self, request: Request) -> None:
        """It ends; the last it has decided may still have to leave with its last output."""
        self._ends.pop(request.request_id, None)
