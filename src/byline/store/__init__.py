"""The store: what is kept, and how it is found again."""

from byline.store.chunks import DamagedError
from byline.store.manifest import Manifest
from byline.store.store import Store
from byline.store.stored import Stored, StoredRows
from byline.store.upkeep import Problem, Report, gc, info, repair, verify

__all__ = [
    "DamagedError",
    "Manifest",
    "Problem",
    "Report",
    "Store",
    "Stored",
    "StoredRows",
    "gc",
    "info",
    "repair",
    "verify",
]
