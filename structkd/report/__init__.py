"""Run folders -> one self-contained HTML file: configuration, provenance, tables, plots; no script, no network."""

from structkd.report.draw import draw
from structkd.report.page import finish, write

__all__ = ["draw", "finish", "write"]
