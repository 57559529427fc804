"""Nüwa's first stage (arXiv 2602.02951): what the vision encoder decides, image by image.

Every patch has a *salience*. The most salient ones of every 2 x 2 region are *anchors*; only they
run in the decoder. An anchor salient even among anchors is a *pillar* and stays as it is; the others
are *collectors*: they take in their surroundings, weighted by likeness and proximity.

Follows the authors' code rather than the paper's text, where the two differ. Pure functions of one
image's tensors; the model classes in `models/` read the vision towers.
"""
