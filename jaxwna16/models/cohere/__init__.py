"""Command R and its successors."""
