"""Mixed HTTP traffic against a server on this machine, and what must be true of it afterwards."""
