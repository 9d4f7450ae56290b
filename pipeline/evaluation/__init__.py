"""Scores of estimates, masks and encoders, and their statistics."""
