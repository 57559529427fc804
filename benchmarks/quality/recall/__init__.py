"""Getting visual tokens back in a later turn of a conversation, tried on plain torch (docs/recall.md)."""
