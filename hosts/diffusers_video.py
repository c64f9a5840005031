"""The former name of `fatezero.hosts.diffusers.unet3d`."""

from .diffusers.unet3d import *  # noqa: F403
