"""What methods share: control of layers, key frames, prompt alignment, masks. No host, no UNet."""
