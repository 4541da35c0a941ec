"""What ``explain`` answers: as a table, as plain data and as a picture."""

from attnres_rewrite.report.data import SiteReport, StreamReport
from attnres_rewrite.report.summary import Report, make_report

__all__ = ["Report", "SiteReport", "StreamReport", "make_report"]
