"""What `benchmarks.bench.worker` is asked to do in its process, which imports this file and no more."""

import os


def remember(state, value):
    state["value"] = state.get("value", 0) + value
    print("said", flush=True)
    return state["value"]


def complain(state):
    raise ValueError("does not fit")


def vanish(state):
    os._exit(3)
