"""The command `fatezero`: its options made of the settings, YAML files, runs."""
