"""What must be equal before one engine may read blocks that another has written.

Everything that changes the bytes of a page, or what they mean: model and weights, dtypes, block and parallel shape,
attention backend and CPU instruction set, page layout, versions. Without the rank: all ranks of an engine agree.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared.kv.messages import Geometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

FORMAT = 2
# Reading whole weight files would take minutes: the head of a safetensors file names and places every tensor, and
# head, tail and size together change with any retraining.
SAMPLE_BYTES = 1024 * 1024
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def geometry_of(
    vllm_config: "VllmConfig",
    kv_cache_config: "KVCacheConfig",
    block_bytes: int,
    kv_caches: dict[str, torch.Tensor],
) -> Geometry:
    """The geometry that this rank announces to its node's store. `block_bytes`: of its own layers' pages."""
    facts = facts_of(vllm_config, kv_caches)
    parallel = vllm_config.parallel_config
    return Geometry(
        fingerprint=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32],
        block_size=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
        slot_bytes=slot_bytes_of(vllm_config, block_bytes),
        ranks=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
        max_model_len=vllm_config.model_config.max_model_len,
    )


def slot_bytes_of(vllm_config: "VllmConfig", block_bytes: int) -> int:
    """Equal for all ranks: the pipeline stage with most layers fills its slots, others leave the end empty."""
    from vllm.distributed.utils import get_pp_indices

    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    if stages == 1:
        return block_bytes
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    borders = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    counts: list[int] = [last - first for first, last in borders]
    own: int = counts[parallel.rank // parallel.tensor_parallel_size]
    return block_bytes // own * max(counts)


def facts_of(vllm_config: "VllmConfig", kv_caches: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The facts behind a fingerprint, JSON-ready; logged by name when two sides differ."""
    import vllm

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    return {
        "format": FORMAT,
        "vllm": vllm.__version__,
        "model": weights_digest(model.model, model.revision),
        "config": _digest(model.hf_config.to_json_string(use_diff=False).encode()),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_cache_dtype": str(cache.cache_dtype),
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "attention": sorted(attention_backends(vllm_config)),
        # Kinds of pages: their number differs with the memory given to an engine, layers with the pipeline's stage.
        "pages": sorted({f"{cache.dtype} {list(cache.shape[1:])}" for cache in kv_caches.values()}),
    }


def attention_backends(vllm_config: "VllmConfig") -> set[str]:
    """Names of the backends in use, with the instruction set that decides the inside of a page on a CPU."""
    found = set()
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if hasattr(layer, "get_attn_backend"):
            found.add(f"{layer.get_attn_backend().get_name()}/{getattr(layer, 'isa', '')}")
    return found


def weights_digest(model: str, revision: str | None) -> str:
    """A digest of a model folder's weight files, or of a repository's name and revision."""
    folder = Path(model)
    if not folder.is_dir():
        return _digest(f"{model}@{revision or ''}".encode())
    hasher = hashlib.blake2b(digest_size=16)
    for pattern in WEIGHT_PATTERNS:
        for path in sorted(folder.glob(pattern)):
            size = path.stat().st_size
            hasher.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                hasher.update(file.read(SAMPLE_BYTES))
                file.seek(max(0, size - SAMPLE_BYTES))
                hasher.update(file.read(SAMPLE_BYTES))
    return hasher.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
