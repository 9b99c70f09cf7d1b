"""The ways to run a network: eager, prepacked for oneDNN, ONNX Runtime, compiled ahead of time by Inductor.

Each takes a network whose one input has a fixed shape, and answers a function of such an input. What
has to be exported or compiled first is kept in a folder and found there by the next process.
"""

import copy
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from models.specs import Precision, Runtime

Run = Callable[[Tensor], Tensor]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPORTERS_TALK = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class CannotRun(Exception):
    """This runtime cannot run this network on this machine; the message says why."""


def start(runtime: Runtime, precision: Precision, network: nn.Module, example: Tensor, keep_as: Path) -> Run:
    """A function of tensors shaped as `example`, on its device, that answers fp32. Raises CannotRun.

    `keep_as` names, without a suffix, where exported and compiled networks are kept: it must change
    with the weights, the shape and the precision.
    """
    dtype = DTYPES[precision]
    if dtype != torch.float32:
        network = copy.deepcopy(network).to(dtype)
    try:
        match runtime:
            case "torch-eager":
                run = _eager(network)
            case "torch-onednn":
                run = _eager(with_packed_linears(network))
            case "inductor":
                run = _inductor(network, example.to(dtype), keep_as.with_name(f"{keep_as.name}-{_machine()}.pt2"))
            case "onnxruntime":
                run = _onnxruntime(network, example, keep_as.with_name(f"{keep_as.name}-torch-{version('torch')}.onnx"))
        if runtime != "torch-eager" or precision != "fp32":  # which any machine can run
            with torch.inference_mode():
                run(example.to(dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # exporters, compilers, loaders and kernels each raise their own
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CannotRun(f"{runtime} {precision}: {type(error).__name__}: {reason}") from error
    return lambda images: run(images.to(dtype)).float()


class PackedLinear(nn.Module):
    """A Linear whose weights lie as oneDNN's matrix product reads them, instead of being reordered in every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous())

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")
        return outputs


def with_packed_linears(network: nn.Module) -> nn.Module:
    """A copy of the network that shares its weights, with every Linear packed."""
    if any(parameter.device.type != "cpu" for parameter in network.parameters()):
        raise CannotRun("oneDNN packs weights on the CPU only")
    memo = {id(parameter): parameter for parameter in network.parameters()}
    packed = copy.deepcopy(network, memo)
    linears = [(name, each) for name, each in packed.named_modules() if type(each) is nn.Linear]
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        setattr(packed.get_submodule(parent), child, PackedLinear(linear))
    return packed


def _eager(network: nn.Module) -> Run:
    def run(images: Tensor) -> Tensor:
        embeddings: Tensor = network(images)
        return embeddings

    return run


def _onnxruntime(network: nn.Module, example: Tensor, graph: Path) -> Run:
    if example.device.type != "cpu":
        raise CannotRun("ONNX Runtime is used on the CPU only")
    import onnxruntime

    with _made_once(graph) as made:
        if made:
            with _quiet_exporters():
                program = torch.onnx.export(network, (example,), dynamo=True, verbose=False)
            assert program is not None
            program.save(made)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return lambda images: torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])


def _inductor(network: nn.Module, example: Tensor, package: Path) -> Run:
    with _made_once(package) as made:
        if made:
            with torch.no_grad(), _quiet_exporters():
                program = torch.export.export(network, (example,))
                # Freezing lets oneDNN prepack the weights, which are constants from here on.
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(made), inductor_configs={"freezing": True}
                )
    run: Any = torch._inductor.aoti_load_package(str(package))

    def first(images: Tensor) -> Tensor:
        answer = run(images)
        embeddings: Tensor = answer[0] if isinstance(answer, (list, tuple)) else answer
        return embeddings

    return first


@contextmanager
def _made_once(target: Path) -> Iterator[Path | None]:
    """Where to write what `target` shall hold, or None where it is there already. Of several processes one writes."""
    if target.exists():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
            made = Path(folder) / target.name
            yield made
            if [path.name for path in Path(folder).iterdir()] != [target.name]:
                raise CannotRun(f"{target.name} would be several files")  # weights of gigabytes beside their graph
            made.replace(target)


@contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Without the exporters' warnings, which concern those who write networks."""
    loggers = [logging.getLogger(name) for name in EXPORTERS_TALK]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)


def _machine() -> str:
    """What compiled code depends on."""
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else platform.machine()
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "-").lower()
    return f"torch-{version('torch')}-{device}-{capability}-{torch.get_num_threads()}"
