"""The list of mutants fits the code: what it changes is there, and so are the tests it names."""

import ast
from collections import Counter

from tests.mutants.catalogue import MUTANTS
from tests.mutants.running import ROOT


def functions_of(file):
    """Names of the test functions of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_mutant_can_be_made_and_has_its_tests():
    for mutant in MUTANTS:
        text = mutant.applied(ROOT)
        assert text != (ROOT / mutant.file).read_text(encoding="utf-8"), mutant.name
        ast.parse(text)
        assert mutant.killers, mutant.name
        for killer in mutant.killers:
            file, _, test = killer.partition("::")
            function = test.partition("[")[0]
            assert not test or function in functions_of(file), f"{mutant.name}: no {killer}"
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
