"""The former name of `fatezero.hosts.diffusers.temporal`."""

from .diffusers.temporal import *  # noqa: F403
