"""Folders of cases in, folders of results out."""
