"""What routing did to one request: its decisions as data, as pictures and as a page."""
