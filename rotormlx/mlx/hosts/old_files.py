"""Cache files for hosts whose own files hold only arrays, such as mlx-lm before 0.32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import mlx.core as mx

from rotormlx.mlx.cache import files
from rotormlx.mlx.cache.base import StoredCache
from rotormlx.mlx.host_caches import leaves
from rotormlx.storage import cache_file


def save(
    own: Callable[..., None], file_name: str, caches: Sequence[Any], metadata: Mapping[str, str]
) -> None:
    """Save caches: compressed ones in the layout of mlx-lm 0.32, others as the host does."""
    if any(isinstance(cache, StoredCache) for _, _, cache in leaves(caches)):
        files.write(file_name, caches, metadata)
    else:
        own(file_name, caches, metadata)


def load(
    own: Callable[..., Any], host_caches: ModuleType, file_name: str, return_metadata: bool
) -> Any:
    """Load a file that :func:`save` or the host itself has written."""
    _, texts = cast(tuple[Any, dict[str, str]], mx.load(file_name, return_metadata=True))
    if cache_file.is_old_layout(texts):
        return own(file_name, return_metadata)
    with cache_file.opened(file_name) as saved:
        caches = files.read(saved, host_caches)
    return (caches, saved.metadata) if return_metadata else caches
