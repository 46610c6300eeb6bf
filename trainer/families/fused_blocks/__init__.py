"""FP8 forward passes of the families' blocks: `projections` has what all share, then one module a family."""
