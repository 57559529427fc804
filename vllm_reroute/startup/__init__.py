"""From flags or Python options to a routed engine: what is chosen, what is refused, what is reported."""
