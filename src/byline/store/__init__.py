"""The store: what is kept, and how it is found again."""

from byline.store.store import Manifest, Store, Stored, StoredRows

__all__ = ["Manifest", "Store", "Stored", "StoredRows"]
