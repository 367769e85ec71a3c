"""The packages that run models, with one file each and a common interface.

Importing this package imports none of the hosts.
"""

from __future__ import annotations

from typing import Any

from mlx.nn.layers.base import Module

from rotormlx.mlx.hosts.host import Host
from rotormlx.mlx.hosts.mlx_lm import MLX_LM
from rotormlx.mlx.hosts.mlx_vlm import MLX_VLM

HOSTS: tuple[Host, ...] = (MLX_LM, MLX_VLM)
_BY_PACKAGE = {host.package: host for host in HOSTS}

__all__ = ["HOSTS", "MLX_LM", "MLX_VLM", "Host", "load", "named", "of"]


def of(model: Any) -> Host:
    """Return the host that defines the classes of a model; mlx-lm if none is found.

    Raises:
        ValueError: If it is not a model.
    """
    if not isinstance(model, Module):
        raise ValueError(
            f"[rotormlx] A model from mlx_lm.load or mlx_vlm.load is required, but a "
            f"{type(model).__name__} was given; load returns a pair, so pass its first item."
        )
    if (host := _BY_PACKAGE.get(_package(model))) is not None:
        return host
    packages = {_package(part) for part in model.modules()}
    return next((host for host in HOSTS if host.package in packages), MLX_LM)


def _package(part: Module) -> str:
    """Return the package that defines a part of a model."""
    return type(part).__module__.partition(".")[0]


def named(name: str) -> Host:
    """Return the host of this name.

    Raises:
        ValueError: If there is no such host.
        ImportError: If it is not installed.
    """
    host = next((host for host in HOSTS if host.name == name), None)
    if host is None:
        known = " or ".join(host.name for host in HOSTS)
        raise ValueError(f"[rotormlx] A host must be {known}, but {name!r} was given.")
    if not host.is_available:
        raise ImportError(
            f"[rotormlx] {host.name} is required to load this model, but it is not installed; "
            f"install it: pip install {host.name}."
        )
    return host


def load(path_or_repo: str, name: str | None, **options: Any) -> tuple[Any, ...]:
    """Load a model lazily with the named host, or with the one that supports its type.

    Args:
        path_or_repo: A directory, or the name of a repository.
        name: The host; None for mlx-lm, or for mlx-vlm if only that supports the type.
        **options: Other arguments of its ``load``.

    Raises:
        ValueError: If there is no such host, or no host supports the type of the model.
        ImportError: If the host is not installed.
    """
    if name is not None:
        return named(name).load(path_or_repo, **options)
    try:
        return MLX_LM.load(path_or_repo, **options)
    except ValueError as error:
        is_unknown = "not supported" in str(error)
        if is_unknown and MLX_VLM.is_available:
            return MLX_VLM.load(path_or_repo, **options)
        raise
