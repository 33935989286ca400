"""What people do with scores: find mislabelled examples, choose what to train on, share royalties."""

from byline.uses.mislabels import Mislabels, find_mislabels, out_of_sample_loss
from byline.uses.own import OwnData, look_for_mislabels, read_images, read_table
from byline.uses.selection import Selection, select
from byline.uses.shares import Shares, shares

__all__ = [
    "Mislabels",
    "OwnData",
    "Selection",
    "Shares",
    "find_mislabels",
    "look_for_mislabels",
    "out_of_sample_loss",
    "read_images",
    "read_table",
    "select",
    "shares",
]
