"""The configuration files of the authors of FateZero, Tune-A-Video and TokenFlow."""
