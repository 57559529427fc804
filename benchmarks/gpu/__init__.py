"""What a GPU has to show before its numbers count, and the numbers: `make gpu`."""
