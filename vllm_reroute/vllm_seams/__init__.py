"""Runtime hooks on vLLM where it has no extension point, and the checks that guard them.

Each hook has a diff and a ledger entry in `patches/`.
"""
