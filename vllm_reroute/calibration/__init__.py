"""Schedules fitted to a model and its questions: record attention once, solve, say how sure that is.

`samples` reads questions, `recording` runs them on plain transformers, `rows` keeps what was seen,
`objective` says what a schedule loses of it, `reroute_solver` and `removal_solver` find the schedule that
loses least, `confidence` how far to trust it; `file` is what an engine serves.
"""
