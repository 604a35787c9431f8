"""Volumes on disk and in model space."""
