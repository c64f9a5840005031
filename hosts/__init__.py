"""The two places that know how a host's UNet is hooked and called."""
