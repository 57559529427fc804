"""What ranks visual tokens at a decision: one scorer per file, higher scores are kept."""
