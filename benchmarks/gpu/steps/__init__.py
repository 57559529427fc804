"""The steps of `make gpu`: each runs in a process of its own and writes one record."""
