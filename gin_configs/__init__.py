"""Gin pages, found by short name through launch/config.py."""
