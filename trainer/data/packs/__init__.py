"""Many items of the cache in few files: a million small files are slow to make, to list and to delete.

A pack is a file to which items are appended, up to some hundred MiB, with an index beside it once it is full. Read
`pack_file` (the bytes of both), then `pack_folder` (the packs of a folder together: which of them has an item).

Every process writes packs of its own, so that jobs share a cache without locks. A process that is killed leaves a pack
without an index, of which every whole item counts. Nothing is ever changed in a pack: an item that turns out to be
damaged when it is read is listed beside it, and encoded again by the next start.
"""
