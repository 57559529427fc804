"""Rerouted model classes, one small file per family."""
