"""Labelled pictures as published sets and users' folders lay them out."""
