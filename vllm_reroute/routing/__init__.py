"""On the device: score visual tokens, choose who runs, hold the others, bring them back."""
