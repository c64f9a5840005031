"""Settings of the commands: what there is, from files and from options, checked."""
