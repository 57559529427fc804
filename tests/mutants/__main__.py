"""`python -m tests.mutants`: spoil the package in one small way after the other; tests must notice.

A mutant survives where the tests it names still pass: they have no teeth there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.running import Copy

LIMIT_S = 300.0
"""For the tests of one mutant, which take a few seconds; a change may make them wait for ever."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants")
    parser.add_argument("--list", action="store_true", help="show all mutants, run nothing")
    options = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = sorted(set(options.only or ()) - known.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}. --list shows all")
    chosen = [known[name] for name in options.only] if options.only else list(MUTANTS)
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:40} {mutant.file:44} {' '.join(mutant.killers)}")
        return 0
    survivors = run(chosen)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were caught.")
    for mutant in survivors:
        print(f"SURVIVED {mutant.name} in {mutant.file}; should have failed: {mutant.killers}")
    return int(bool(survivors))


def run(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Those that survive. Raises RuntimeError where tests fail without any mutant."""
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, Copy(Path(folder)) as copy:
        # Before minutes of results that mean nothing.
        for mutant in mutants:
            mutant.applied(copy.folder)
        tests = sorted({test for mutant in mutants for test in mutant.killers})
        print(f"{len(tests)} tests, as the code is …", flush=True)
        passed, printed = copy.passes(tests, 10 * LIMIT_S)
        if not passed:
            raise RuntimeError(f"These tests fail without any mutant:\n{printed[-4000:]}")
        bar = tqdm(mutants, unit="mutant", file=sys.stdout, dynamic_ncols=True)
        for mutant in bar:
            bar.set_postfix_str(mutant.name)
            begin = time.monotonic()
            with copy.spoilt(mutant):
                passed, _ = copy.passes(mutant.killers, LIMIT_S)
            said = "SURVIVED" if passed else "caught"
            bar.write(f"{said:9} {time.monotonic() - begin:5.1f} s  {mutant.name}", sys.stdout)
            if passed:
                survivors.append(mutant)
    return survivors


if __name__ == "__main__":
    sys.exit(main())
