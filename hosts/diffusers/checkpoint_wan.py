"""The former name of `fatezero.hosts.diffusers.wan`."""

from ...models.wan import WAN
from .wan import WanCheckpoint

NAME = WAN.demo
__all__ = ["NAME", "WanCheckpoint"]
