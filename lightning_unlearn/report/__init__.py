"""A fit to look at: what a run directory holds, and the one HTML file that is made of it."""

from lightning_unlearn.report.actions import shown_samples
from lightning_unlearn.report.record import RunRecord
from lightning_unlearn.report.render import render_report, write_report
from lightning_unlearn.report.samples import SampleView

__all__ = ["RunRecord", "SampleView", "render_report", "shown_samples", "write_report"]
