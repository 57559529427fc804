"""Other versions of vLLM than the installed one: had from their wheels, compared, tried."""
