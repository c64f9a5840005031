"""What methods share: layers and what they are asked to do, key frames, prompt alignment, masks. No host, no UNet."""
