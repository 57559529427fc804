"""`taper`: each decision keeps two thirds of what the one before kept."""

from vllm_reroute.schedule import PublishedSchedule


def two_thirds(first: float, decisions: int) -> list[float]:
    return [first * (2 / 3) ** i for i in range(decisions)]


TAPER = {"reroute": PublishedSchedule(layers=(2, 10, 20), shape=two_thirds)}
