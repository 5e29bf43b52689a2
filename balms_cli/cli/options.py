"""Options that several subcommands share, each said once. ``None`` means: not given, so preset, file or default decide."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..config import CLASSIFIERS, LOSSES, REWEIGHTERS, SAMPLERS

_OUTPUT, _RECIPE, _RUN = "Output", "Recipe", "Run"


def complete(*words: str):
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _turn_on_debug(value: bool) -> bool:
    if value:
        os.environ["BALMS_DEBUG"] = "1"
    return value


Workspace = Annotated[
    Path, Option(envvar="BALMS_WORKSPACE", help="Where manifests and runs are kept.", rich_help_panel=_OUTPUT)
]
Out = Annotated[
    Path | None, Option(help="Folder of the result (default: a new one in the workspace).", rich_help_panel=_OUTPUT)
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an earlier result in --out.", rich_help_panel=_OUTPUT)]
Json = Annotated[bool, Option("--json", help="Print one JSON object instead of the path.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Nothing on stderr but errors.", rich_help_panel=_OUTPUT)]
Debug = Annotated[
    bool, Option("--debug", help="Show the traceback of an error.", callback=_turn_on_debug, rich_help_panel=_OUTPUT)
]
Profile = Annotated[bool, Option("--profile", help="Take a few steps, show where their time goes, write a trace (Chrome, "
                                 "Perfetto) and no run.", rich_help_panel=_OUTPUT)]  # fmt: skip
Tensorboard = Annotated[bool | None, Option("--tensorboard", help="Write RUN/tensorboard too: the numbers of metrics.jsonl "
                                            "as event files.", rich_help_panel=_OUTPUT)]  # fmt: skip
DryRun = Annotated[bool, Option("--dry-run", help="Check everything, print the plan, write nothing.", rich_help_panel=_OUTPUT)]

ConfigFile = Annotated[Path | None, Option("--config", help="TOML file with a table for this stage.", rich_help_panel=_RECIPE)]
Sets = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Any value of the configuration; repeatable.",
                                          rich_help_panel=_RECIPE)]  # fmt: skip
PrintConfig = Annotated[bool, Option("--print-config", help="Print the resolved configuration as TOML and stop.",
                                     rich_help_panel=_RECIPE)]  # fmt: skip
Preset = Annotated[str | None, Option(help="quick, paper, general, or a published recipe for photos: imagenet-lt, places-lt, "
                                      "inaturalist18 (default: quick on a CPU).",
                                      autocompletion=complete("quick", "paper", "general", "imagenet-lt", "places-lt",
                                                              "inaturalist18"), rich_help_panel=_RECIPE)]  # fmt: skip
Seed = Annotated[int | None, Option(help="Seed of everything random (default 0).", rich_help_panel=_RECIPE)]
Steps = Annotated[int | None, Option(help="Optimizer steps.", rich_help_panel=_RECIPE)]
Epochs = Annotated[float | None, Option(help="Passes over the training images (instead of --steps).", rich_help_panel=_RECIPE)]
BatchSize = Annotated[int | None, Option(help="Images a step.", rich_help_panel=_RECIPE)]
Lr = Annotated[float | None, Option(help="Peak learning rate.", rich_help_panel=_RECIPE)]
Loss = Annotated[str | None, Option(help=f"Training loss: {', '.join(LOSSES)}.", autocompletion=complete(*LOSSES))]
LossExponent = Annotated[float | None, Option(help="tau of balanced and logit-adjusted: logits + tau log n (default 1); "
                                              "of cost-sensitive: 1/n^tau.")]  # fmt: skip
Drw = Annotated[bool | None, Option("--drw", help="Deferred re-weighting: class weights for the last fifth of the steps.")]
Classifier = Annotated[str | None, Option(help="linear (cRT), cosine, lws, tau-norm or ncm (default: a fresh linear layer; "
                                          "cosine for ldam).", autocompletion=complete(*CLASSIFIERS))]  # fmt: skip
Head = Annotated[str | None, Option("--classifier", help="linear or cosine (default: linear; cosine for ldam).",
                                    autocompletion=complete("linear", "cosine"))]  # fmt: skip
TauNorm = Annotated[float | None, Option(help="Exponent of --classifier tau-norm (default: best on the validation split).")]
Reweight = Annotated[str | None, Option(help="Learn a weight for each example: l2rw or meta-weight-net (4 to 5 times slower).",
                                        autocompletion=complete(*REWEIGHTERS))]  # fmt: skip
Sampler = Annotated[str | None, Option(help="instance, class (CBS), square-root, progressive, or a rates.json.",
                                       autocompletion=complete(*SAMPLERS))]  # fmt: skip

Device = Annotated[str | None, Option(help="auto, cpu, cuda, cuda:1 ...", autocompletion=complete("auto", "cpu", "cuda"),
                                      rich_help_panel=_RUN)]  # fmt: skip
Precision = Annotated[str | None, Option(help="auto, fp32 or bf16.", autocompletion=complete("auto", "fp32", "bf16"),
                                         rich_help_panel=_RUN)]  # fmt: skip
Workers = Annotated[int | None, Option(min=0, help="Decoder threads (default: one a processor, 8 at most).",
                                       rich_help_panel=_RUN)]  # fmt: skip
Compile = Annotated[str | None, Option(help="torch.compile the network: auto (in long runs), off, on, or cuda-graphs (GPU).",
                                       autocompletion=complete("auto", "off", "on", "cuda-graphs"),
                                       rich_help_panel=_RUN)]  # fmt: skip
Offline = Annotated[bool | None, Option("--offline", help="Never download (also BALMS_OFFLINE=1).", rich_help_panel=_RUN)]
Resume = Annotated[Path | None, Option(metavar="RUN", help="Go on with an interrupted run; takes no other training option.",
                                       rich_help_panel=_RUN)]  # fmt: skip

ImagesFolder = Annotated[Path | None, Option("--images", metavar="DIR", help="Folder that the paths of a list or CSV file are "
                                             "relative to (default: the file's own).")]  # fmt: skip
ClassNames = Annotated[Path | None, Option("--names", metavar="FILE", help="Names of the classes: synset_words.txt, "
                                           "categories.json, categories_places365.txt, or one a line.")]  # fmt: skip
LeafClasses = Annotated[bool | None, Option("--leaf-classes", help="Each folder that holds images is a class, however deep "
                                            "(iNaturalist), not the outermost.")]  # fmt: skip

Checkpoint = Annotated[str | None, Argument(metavar="RUN", help="A run's folder or its model.safetensors, - for stdin "
                                            "(default: the newest fitting run of the workspace).")]  # fmt: skip
Data = Annotated[Path | None, Option(help="Another manifest than the checkpoint's own.")]

MetaEstimator = Annotated[str | None, Option(help="class (B x C), image (the text's own, B x N) or expected.",
                                             autocompletion=complete("class", "image", "expected"))]  # fmt: skip
GumbelTemperature = Annotated[float | None, Option(help="Temperature of the relaxed draw (default 1).")]
Hypergradient = Annotated[str | None, Option(help="auto, closed-form, jvp or higher: the same number at another cost.",
                                             autocompletion=complete("auto", "closed-form", "jvp", "higher"))]  # fmt: skip
MetaSet = Annotated[str | None, Option(help="Where meta images come from: train, or the held-out meta split.")]
FeatureMode = Annotated[str | None, Option("--features", help="bank (computed once) or online (anew every step).")]
Views = Annotated[int | None, Option(help="Augmented views of every image in the feature bank.")]
TargetPrior = Annotated[str | None, Option(metavar="PRIOR", help="Scores for another class prior: uniform, train, reversed, "
                                           "or a JSON file {class: share}.")]  # fmt: skip
PosthocTau = Annotated[float | None, Option(help="Post-hoc logit adjustment: its strength (default 1; the target is uniform "
                                            "unless --target-prior says otherwise).")]  # fmt: skip

# Options that go together in several commands: name -> (kind, default).
Group = dict[str, tuple[Any, Any]]
TRAINING: Group = {"batch_size": (BatchSize, None), "lr": (Lr, None), "seed": (Seed, None)}
CONFIG: Group = {"config": (ConfigFile, None), "sets": (Sets, None), "print_config": (PrintConfig, False)}
MACHINE: Group = {"device": (Device, None), "precision": (Precision, None), "workers": (Workers, None)}
WORKSPACE: Group = {"workspace": (Workspace, Path("balms-runs"))}
RUN: Group = {"resume": (Resume, None), **WORKSPACE, "out": (Out, None), "overwrite": (Overwrite, False),
              "tensorboard": (Tensorboard, None), "dry_run": (DryRun, False)}  # fmt: skip
TELLING: Group = {"json": (Json, False), "quiet": (Quiet, False), "debug": (Debug, False)}


def having(*groups: Group) -> Callable[[Callable], Callable]:
    """A command that has the options of ``groups`` too, in place of its ``**options``.

    Typer reads the signature, so they stand there; a command takes all its values from ``ctx.params``.
    """

    def with_options(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
                 for group in groups for name, (kind, default) in group.items()]  # fmt: skip
        command.__signature__ = inspect.Signature([*own, *added])
        return command

    return with_options
