"""The report of a run as one HTML file: its content as plain data, and the page made of it."""

from pave_lightning.reporting.page.content import Page
from pave_lightning.reporting.page.rendering import write_page

__all__ = ["Page", "write_page"]
