"""The offline report: one HTML file that shows efficacy beside cost, with everything it needs inside."""

from byline.report.page import build, render
from byline.report.scores import Shown, scores_page
from byline.report.words import as_good_as, percent, verdict
from byline.report.works import works_page

__all__ = ["Shown", "as_good_as", "build", "percent", "render", "scores_page", "verdict", "works_page"]
