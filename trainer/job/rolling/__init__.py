"""A cache that may be larger than the volume: `rolling_cache` decides whether a run needs that, and brings what the
next steps need.
"""
