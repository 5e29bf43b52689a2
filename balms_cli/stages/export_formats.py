"""A classifier in three formats that others run: ONNX, a ``torch.export`` program, plain safetensors weights.

Each is made in memory and handed back with a function that runs those very bytes, so that what is written is what was
checked. Shapes: B batch, C classes, S pixels a side.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, one_line
from ..models.backbones import build_backbone, describe, holds, in_torchvision
from ..models.classifiers import Classifier, CosineHead
from ..models.weights import fill

FORMAT, WEIGHTS, SIDECAR = "balms-export 1", "model.safetensors", "config.json"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_PROTOBUF_LIMIT = 2**31 - 2**24  # one ONNX file holds at most 2 GiB
_MAX_SIDECAR_BYTES = 50_000_000

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # images float32 [B, 3, S, S] in 0..1 to logits, probabilities [B, C]


@dataclass(frozen=True)
class Exported:
    """``files``: content by name (one of them: the file that is asked for). ``run``: runs what they hold."""

    files: dict[str, bytes]
    run: Run


class Deployable(nn.Module):
    """The network as a stranger uses it: images float32 [B, 3, S, S], RGB in 0..1, to logits and probabilities [B, C]."""

    def __init__(self, model: Classifier, mean: tuple, std: tuple):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.backbone((images - self.mean) / self.std))
        return logits, logits.softmax(1)


class ShiftedHead(nn.Module):
    """Another class prior on a head without a bias."""

    def __init__(self, head: nn.Module, shift_C: Tensor):
        super().__init__()
        self.head = head
        self.register_buffer("shift", shift_C.float())

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.head(features_BD) + self.shift


def with_shift(model: Classifier, shift_C: Tensor | None) -> Classifier:
    """A classifier whose logits are ``shift_C`` higher: in the bias where there is one."""
    if shift_C is None:
        return model
    head = deepcopy(model.head)
    if isinstance(head, nn.Linear):
        head.bias.data = (head.bias.data.double() + shift_C).float()
    else:
        head = ShiftedHead(head, shift_C)
    return Classifier(model.backbone, head).eval()


def require_packages(to: str) -> None:
    """Raises ConfigError (exit 2) where a package that the format needs is not installed."""
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None] if to == "onnx" else []
    if missing:
        raise ConfigError(f"--to onnx needs {', '.join(missing)}, not installed here: pip install 'balms[onnx]'")


def to_onnx(model: Classifier, about: dict[str, Any]) -> Exported:
    """One ONNX file: input ``images``, outputs ``logits`` and ``probabilities``, any batch size; ``about`` in its
    metadata, text as it is and the rest as JSON. Run by ONNX Runtime on the CPU.

    Raises ConfigError for a network over ONNX's 2 GiB, CheckpointError for one that cannot be told in ONNX.
    """
    import onnxruntime

    if (size := sum(t.numel() * t.element_size() for t in model.state_dict().values())) > _PROTOBUF_LIMIT:
        raise ConfigError(f"the network takes {size / 2**30:.1f} GiB and an ONNX file holds 2: use --to torch or safetensors")
    network = Deployable(model, about["mean"], about["std"])
    with _translating("ONNX"):
        program = torch.onnx.export(
            network, (_example(about),), dynamo=True, verbose=False, input_names=["images"],
            output_names=["logits", "probabilities"], dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        )  # fmt: skip
        proto = program.model_proto
        _strip(proto.graph)
        proto.producer_name, proto.producer_version = "balms", about["balms_version"]
        for key, value in about.items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        content = proto.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, probabilities = session.run(["logits", "probabilities"], {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(probabilities)

    return Exported({"model.onnx": content}, run)


def to_torch(model: Classifier, about: dict[str, Any]) -> Exported:
    """One ``torch.export`` program: ``torch.export.load(FILE).module()(images)`` gives logits and probabilities, without
    balms; ``about`` is its extra file ``balms.json``. Raises CheckpointError for a network that cannot be traced."""
    network = Deployable(model, about["mean"], about["std"])
    with _translating("a torch.export program"):
        program = torch.export.export(network, (_example(about),),
                                      dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})  # fmt: skip
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"balms.json": json.dumps(about, ensure_ascii=False)})
        loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        return loaded(images)

    return Exported({"model.pt2": buffer.getvalue()}, run)


def to_safetensors(model: Classifier, about: dict[str, Any]) -> Exported:
    """Weights by name (``backbone.*``, ``head.*``) and a sidecar that says how to build the network around them.

    Raises ConfigError for a cosine head with another class prior, whose shift is not one of its weights.
    """
    if isinstance(model.head, ShiftedHead):
        raise ConfigError("plain weights of a cosine classifier have no bias to put another class prior in: leave out "
                          "--target-prior and --posthoc-tau, or use --to onnx or torch")  # fmt: skip
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    known = _in_torchvision(model, about)
    sidecar = about | {"weights": WEIGHTS, "names": _names(about), "torchvision": known, "load": _how_to_load(known)}
    content, text = save(tensors, metadata={"format": "pt"}), json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n"
    built = _built(content, json.loads(text)) if known is None else _built_by_torchvision(content, json.loads(text))
    return Exported({WEIGHTS: content, SIDECAR: text.encode()}, Deployable(built, about["mean"], about["std"]).eval())


def rebuild(folder: str | Path) -> Deployable:
    """The network of a folder that ``--to safetensors`` wrote, in eval mode. Raises CheckpointError for anything else."""
    folder = Path(folder)
    try:
        if (folder / SIDECAR).stat().st_size > _MAX_SIDECAR_BYTES:
            raise ValueError("it is too large")
        sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        if sidecar["format"] != FORMAT:
            raise ValueError(f"its format is {sidecar['format']!r:.40}, not {FORMAT!r}")
        model = _built((folder / WEIGHTS).read_bytes(), sidecar)
        return Deployable(model, tuple(sidecar["mean"]), tuple(sidecar["std"])).eval()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a model that balms export --to safetensors wrote: {one_line(error)}") from None


def _built(content: bytes, sidecar: dict[str, Any]) -> Classifier:
    """From the bytes of the two files alone."""
    tensors, classes, features, size = (load(content), len(sidecar["classes"]), sidecar["feature_dim"], sidecar["image_size"])
    # A file decides how large a network is built, so its own tensors must bear it out first.
    if tuple(tensors["head.weight"].shape) != (classes, features) or not 8 <= size <= 1024:
        raise ValueError(f"its weights do not fit {classes} classes x {features} features at {size} px")
    name = str(sidecar["backbone"])
    if not holds({key.removeprefix("backbone."): tensor for key, tensor in tensors.items()}, name, size):
        raise ValueError(f"it does not hold a {name:.40}")
    head = CosineHead(features, classes) if sidecar["head"] == "cosine" else nn.Linear(features, classes)
    model = Classifier(build_backbone(name, size), head)
    fill(model, tensors)
    return model.eval()


def _built_by_torchvision(content: bytes, sidecar: dict[str, Any]) -> Classifier:
    """The same by torchvision's own network of that name, as a stranger does it who follows the sidecar."""
    from torchvision.models import get_model

    known = sidecar["torchvision"]
    network = get_model(known["model"], **known["arguments"])
    network.load_state_dict({_renamed(name, known["rename"]): tensor for name, tensor in load(content).items()})
    return Classifier(network, nn.Identity()).eval()


def _renamed(name: str, rename: dict[str, str]) -> str:
    start = next(start for start in rename if name.startswith(start))
    return rename[start] + name.removeprefix(start)


def _in_torchvision(model: Classifier, about: dict[str, Any]) -> dict[str, Any] | None:
    """How torchvision's own model takes these weights; None where it has no such model with a linear last layer."""
    name = about["backbone"]
    if not in_torchvision(name) or not isinstance(model.head, nn.Linear):
        return None
    from torchvision.models import get_model

    arguments = {"num_classes": len(about["classes"])}
    arguments |= {"image_size": about["image_size"]} if name.startswith("vit") else {}
    with torch.device("meta"):
        theirs = set(get_model(name, **arguments).state_dict())
    last = theirs - set(model.backbone.state_dict())
    layer = next(iter(last)).rpartition(".")[0]
    if last != {f"{layer}.weight", f"{layer}.bias"}:
        return None  # maxvit's last layer has no bias
    return {"model": name, "arguments": arguments, "rename": {"backbone.": "", "head.": f"{layer}."}}


def _names(about: dict[str, Any]) -> str:
    head = ("head.weight [C, D], head.scale: logits = scale * cosine(features, weight)" if about["head"] == "cosine"
            else "head.weight [C, D], head.bias [C]: logits = features @ weight.T + bias")  # fmt: skip
    return f"backbone.*: {describe(about['backbone'])}, images to features [B, D]; {head}"


def _how_to_load(known: dict[str, Any] | None) -> list[str]:
    """Lines of Python that give ``network``: to logits, from images of 0..1 normalised by ``mean`` and ``std``."""
    if known is None:
        return ["from balms_cli.stages.export import rebuild",
                "network = rebuild('.')  # normalises; gives logits and probabilities"]  # fmt: skip
    return [
        "import json", "from safetensors.torch import load_file", "from torchvision.models import get_model",
        "about = json.load(open('config.json', encoding='utf-8'))['torchvision']",
        "network = get_model(about['model'], **about['arguments']).eval()",
        "body, last = about['rename'].items()",
        "network.load_state_dict({k.replace(*body, 1) if k.startswith(body[0]) else k.replace(*last, 1): v",
        "                         for k, v in load_file('model.safetensors').items()})",
    ]  # fmt: skip


def _example(about: dict[str, Any]) -> Tensor:
    return torch.zeros(2, 3, about["image_size"], about["image_size"])


def _strip(graph: Any) -> None:
    """Take out what the exporter notes of each node for those who debug it: source lines and paths of this machine."""
    for part in (graph.node, graph.initializer, graph.value_info, graph.input, graph.output):
        for entry in part:
            del entry.metadata_props[:]
    del graph.metadata_props[:]


@contextmanager
def _translating(what: str) -> Iterator[None]:
    """Exporters talk, on both streams and by warnings; what they raise becomes one line. ``--debug`` shows the rest."""
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    except ImportError as error:  # an exporter that wants a later one of its packages
        raise ConfigError(f"{one_line(error)}: a package is too old for this torch; pip install -U 'balms[onnx]'") from error
    except Exception as error:  # torch.export, onnxscript and ONNX Runtime raise dozens of kinds
        raise CheckpointError(f"this network cannot be written as {what} ({one_line(error)}); try another --to, or --debug "
                              "for the whole story") from error  # fmt: skip
    finally:
        logging.disable(before)
