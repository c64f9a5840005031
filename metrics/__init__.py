"""Measures of edits: success, preservation, temporal consistency."""
