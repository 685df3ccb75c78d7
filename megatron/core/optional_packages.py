# Copyright (c) 2026, the megatron-core gptoss authors.

"""Treat an optional package that cannot be imported as one that is not installed.

Megatron imports its optional packages within `try ... except ImportError`. A package that was built
for another CUDA, PyTorch or driver version raises OSError, RuntimeError or AttributeError instead.
Such an error would end the import of megatron.core although the package is not needed.
"""

import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Packages that megatron/ imports within `try`. Errors of required packages (torch, numpy, einops)
# stay unchanged.
OPTIONAL = frozenset(
    """
    absl amp_C apex boto3 botocore causal_conv1d cuda cudnn cupy datasets deep_ep
    emerging_optimizers fast_hadamard_transform fla flash_attn flash_attn_3 flash_mla
    flashattn_hopper flashinfer flashinfer_cubin flashinfer_jit_cache flask flask_restful
    fused_weight_gradient_mlp_cuda grouped_gemm hypercorn mamba_ssm matplotlib mlflow modelopt
    msgpack multistorageclient nixl nvidia_resiliency_ext nvshmem nvidia_kitchen nvtx omegaconf
    one_logger openai_harmony orjson psutil pynvml quart scaled_masked_softmax_cuda scaled_softmax_cuda
    scaled_upper_triang_masked_softmax_cuda sentencepiece tensorboard tensorrt_llm tiktoken tilelang
    torch_memory_saver torchao transformer_engine transformer_engine_torch triton userlib wandb wget
    workload_inspector xxhash zarr zmq zstandard
    """.split()
)


class _OptionalPackages(MetaPathFinder):
    """Converts exceptions from the import of an optional package to ModuleNotFoundError.

    The other finders find the module; this one wraps `exec_module` of its loader.
    """

    def __init__(self):
        self._running = threading.local()
        self._failed: dict[str, str] = {}  # module name -> message

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = fullname.partition(".")[0]
        if package not in OPTIONAL:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    self._guard(spec.loader, package, fullname)
                return spec
        return None

    def _guard(self, loader, package: str, name: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if name in self._failed:  # The module ran in part: it is not executed a second time.
                raise ModuleNotFoundError(self._failed[name], name=name)
            # A package may handle the exceptions of its submodules itself.
            outermost = package not in vars(self._running)
            if not outermost:
                return execute(module)
            setattr(self._running, package, True)
            try:
                execute(module)
            except ImportError:
                raise
            except Exception as error:
                message = (
                    f"{name} is installed but cannot be imported, so Megatron does not use it "
                    f"({type(error).__name__}: {error})"
                )
                self._failed[name] = message
                warnings.warn(message, stacklevel=2)
                raise ModuleNotFoundError(message, name=name) from error
            finally:
                delattr(self._running, package)

        try:
            loader.exec_module = exec_module
        except AttributeError:
            pass  # The loader has slots: the errors of its package stay unchanged.


def treat_broken_packages_as_missing() -> None:
    """Install the import hook, before any optional package is imported.

    A second call does nothing.
    """
    if not any(isinstance(finder, _OptionalPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OptionalPackages())
