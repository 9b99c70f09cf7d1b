"""timm, importable beside the CPU build of torch.

There is no CPU build of torchvision beside torch's own: pip takes a CUDA wheel, whose C++ operators do
not load, and then `import torchvision`, and with it `import timm`, fails with "operator torchvision::nms
does not exist". timm needs none of those operators here, only their names, so they are declared first.
Everything in this project that uses timm imports it from this module.
"""

import torch

# Kept for the life of the process: a Library takes its declarations back when it is collected.
_declared: list[torch.library.Library] = []


def _declare_torchvision_operators() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _declared.append(library)


_declare_torchvision_operators()

import timm  # noqa: E402

__all__ = ["timm"]
