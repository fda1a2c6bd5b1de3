"""What PyTorch finds on this machine: the device for a model, and which packages attention could use."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec

import torch

from harmonium.config import DeviceSetting, environment_text
from harmonium.errors import ConfigError
from harmonium.model.attention import Case, Device


def probe_case(setting: DeviceSetting) -> Case:
    """The device that is asked for ("auto": CUDA where there is one) and what is installed for it.

    Raises ConfigError for "cuda" on a machine where PyTorch finds none.
    """
    device = _device(setting)
    return Case(
        device,
        device.dtype,
        {name: usable for name in _PACKAGES if (usable := _trouble(name, device)) is not None},
        is_interpreted=environment_text("TRITON_INTERPRET") == "1",
    )


def torch_device(device: Device) -> torch.device:
    """PyTorch calls AMD's devices cuda too."""
    return torch.device("cpu" if device.kind == "cpu" else "cuda")


def _device(setting: DeviceSetting) -> Device:
    if setting == "cpu" or not torch.cuda.is_available():
        if setting == "cuda":
            raise ConfigError(
                f"device is 'cuda' and PyTorch {torch.__version__} finds none; expected 'cpu' or 'auto', "
                "or a build of PyTorch for the card that is here"
            )
        return Device("cpu")
    name, (free_bytes, _) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
    if torch.version.hip is not None:
        return Device("rocm", None, name, free_bytes)
    return Device("cuda", torch.cuda.get_device_capability(), name, free_bytes)


_PACKAGES = ("triton", "flash_attn", "flash_attn_interface", "torch>=2.9")


def _trouble(name: str, device: Device) -> str | None:
    """ "" for a package that works, why not for one that does not, None for one that is not there."""
    if name == "torch>=2.9":
        return "" if hasattr(import_module("torch.nn.attention.flex_attention"), "AuxRequest") else None
    if find_spec(name) is None:
        return None
    if name == "triton" or device.kind == "cpu":
        return ""  # Triton is imported with our kernels; the others need a device of their own to import
    try:
        function = import_module(name).flash_attn_func
        parameters = inspect.signature(function).parameters
    except Exception as error:  # a build for another PyTorch fails in many ways
        return f"does not import ({type(error).__name__}: {str(error)[:120]})"
    if "return_attn_probs" not in parameters:
        return "is too old: flash_attn_func has no return_attn_probs, which gives the log-sum-exp"
    return ""
