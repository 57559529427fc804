"""The package's rooms: no import, not even one for a type, leads from a room back to it."""

import ast
from pathlib import Path

import vllm_reroute

PACKAGE = Path(vllm_reroute.__file__).parent


def imports():
    """(room, room it imports, where) for every import of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                package, *inside = name.split(".")
                if package == PACKAGE.name and inside and inside[0] != parts[0]:
                    yield parts[0], inside[0], f"{path.relative_to(PACKAGE)}:{node.lineno}"


def test_no_room_leads_back_to_itself():
    leads: dict[str, set[str]] = {}
    where: dict[tuple[str, str], str] = {}
    for room, other, place in imports():
        leads.setdefault(room, set()).add(other)
        where[room, other] = place
    assert {"schedule", "plan", "routing", "runners"} <= leads.keys()

    def reached(room):
        seen, ahead = set(), [room]
        while ahead:
            new = leads.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        return seen

    back = {
        f"{place}: {room} imports {other}, which leads back"
        for (room, other), place in where.items()
        if room in reached(other)
    }
    assert not back
