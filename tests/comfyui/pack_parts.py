"""What the packs of the test host share. It runs in the host, and is no pack itself."""

import sys

import comfy.model_patcher
import torch
from comfy_api.latest import io

CPU = torch.device("cpu")


def node(name, inputs, outputs, **more):
    """A class decorator that defines the schema."""

    def of(cls):
        cls.define_schema = classmethod(
            lambda _: io.Schema(node_id=name, category="test", inputs=inputs, outputs=outputs, **more)
        )
        cls.__name__ = name
        return cls

    return of


def random_values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_model(config, seed=0, dtype=torch.float32, weights=()):
    """The model of a host's configuration with random weights. weights: by which the host recognises its kind."""
    config.set_inference_dtype(dtype, None)
    model, generator = config.get_model(dict(weights)), torch.Generator().manual_seed(seed)
    for parameter in model.diffusion_model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        inputs = parameter.shape[1:].numel()
        parameter.data = (values / inputs**0.5 if parameter.ndim > 1 else 1 + 0.1 * values).to(dtype)
    return model


def patcher_of(model):
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def loaded(end):
    """A module that another pack has loaded, by the end of its name."""
    return sys.modules[next(name for name in sys.modules if name.endswith(end))]
