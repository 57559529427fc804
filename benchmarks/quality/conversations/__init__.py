"""What `--reroute-history` does to answers: whole conversations, asked of stock, rerouting and removing servers."""
