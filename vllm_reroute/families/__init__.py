"""The model families that can be routed, as far as their configs say; nothing here needs torch."""
