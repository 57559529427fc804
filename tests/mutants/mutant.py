"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One wrong change. old occurs exactly once in `file`, a path from the repository's root.

    killers: tests that must fail with `new` in its place, as pytest names them.
    """

    name: str
    file: str
    old: str
    new: str
    killers: tuple[str, ...]

    def applied(self, root: Path) -> str:
        """Text of the changed file. Raises ValueError where it no longer has `old` exactly once."""
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"Mutant {self.name}: its old text occurs {count} times in {self.file}, not once. "
                f"Adapt it to the code:\n{self.old}"
            )
        return text.replace(self.old, self.new)
