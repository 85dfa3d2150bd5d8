"""Bytes on disk and on the Hub: atomic writes, weights, checkpoint folders, pushes, model cards, readers of other
libraries' files."""
