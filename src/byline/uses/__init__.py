"""What people do with scores: find mislabelled examples, choose what to train on, share royalties."""

from byline.uses.mislabels import Mislabels, find_mislabels, out_of_sample_loss
from byline.uses.selection import Selection, select
from byline.uses.shares import Shares, shares

__all__ = ["Mislabels", "Selection", "Shares", "find_mislabels", "out_of_sample_loss", "select", "shares"]
