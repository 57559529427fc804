"""One HTML page that shows everything, complete in itself."""

from vllm_reroute.explain.page.render import page_html

__all__ = ["page_html"]
