"""One module's tensors; `modules` plans them, `repack` turns them into tiles."""
