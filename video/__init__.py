"""Frames in and out of files, their sizes and crops, and contact sheets."""
