"""Figures and pages for people; computes nothing."""
