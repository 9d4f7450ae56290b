"""Layers, networks and losses that several models share."""
