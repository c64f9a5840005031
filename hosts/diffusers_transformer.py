"""The former name of `fatezero.hosts.diffusers.wan`."""

from .diffusers.wan import *  # noqa: F403
