"""Search among pictures by CLIP's vectors: an index on disk of a folder's pictures, and what lies nearest to a query.

    index = ldm.search.open_index("photos")
    index.search(clip.text_vectors(["a red car"]), top=5)

build -> {scan, embed, store, nearest}; query -> {store, nearest}.
"""

from __future__ import annotations

from ldm.search.build import Report, Share, update
from ldm.search.query import Hit, Index, combined, open_index

__all__ = ["Hit", "Index", "Report", "Share", "combined", "open_index", "update"]
