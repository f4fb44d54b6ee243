"""Readers: one file for each format, behind one interface (:mod:`.base`)."""
