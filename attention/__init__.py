"""The methods, on query, key and value tensors alone: no host, no UNet."""
