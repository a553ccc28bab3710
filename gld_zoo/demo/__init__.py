"""A page that shows what one or two models see in a picture; it needs the extra `demo`."""

from gld_zoo.demo.page import LAUNCH, build_page, serve

__all__ = ["LAUNCH", "build_page", "serve"]
