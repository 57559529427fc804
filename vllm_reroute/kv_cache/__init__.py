"""KV cache of a routed engine: one group per keep ratio, no block for a deferred token."""
