"""Miniature base models that were really trained, small enough to ship, and the world of pictures they know."""
