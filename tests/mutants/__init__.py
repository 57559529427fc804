"""Small wrong changes to the package, each of which a named test must catch: `make mutants`."""
