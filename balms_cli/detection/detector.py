"""What a detector finds in the images of an evaluation, and how it classifies their true boxes.

Shapes: N detections, I true boxes, C categories.
"""

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import DetectEvaluateConfig
from ..data.aside import name_some, printable
from ..engine.distributed import World
from ..engine.runtime import Runtime
from ..reporter import Reporter
from .annotations import Annotations, find_images, load_annotations
from .dataset import DetectImages, Example
from .ground_truth import GroundTruth
from .header import DetectHeader
from .model import detect, load_detector, paste_rle, set_detections
from .results import Results, rounded


class Detector:
    """One checkpoint and the images that it is shown: each process looks at its part of them."""

    def __init__(self, config: DetectEvaluateConfig, file: Path, header: DetectHeader, truth: GroundTruth, runtime: Runtime,
                 reporter: Reporter, world: World):  # fmt: skip
        self.config, self.file, self.header, self.truth = config, file, header, truth
        self.runtime, self.reporter, self.world = runtime, reporter, world
        self.id_of = {name: id for id, name in truth.names.items()}
        self.ids_C = np.array([self.id_of.get(c.name, -1) for c in header.categories], np.int64)  # by label - 1
        self._tell_of_categories()
        self.annotations: Annotations = load_annotations(truth.path, masks=False, every_image=True)
        images = config.images if config.images is not None else find_images(truth.path, None)
        self.images = DetectImages(self.annotations, images, masks=False, workers=config.workers)
        self.model = set_detections(load_detector(file)[0], config).to(runtime.device)

    def _tell_of_categories(self) -> None:
        own, name = {c.name for c in self.header.categories}, printable(self.truth.path.name)
        if extra := sorted(own - self.id_of.keys()):
            self.reporter.note(f"{len(extra)} of the detector's categories are not in {name}, and are left out: "
                               f"{name_some([printable(n) for n in extra], 3)}")  # fmt: skip
        present = {id for id, count in self.truth.image_counts().items() if count}
        if unknown := sorted(n for n, id in self.id_of.items() if n not in own and id in present):
            self.reporter.note(f"{len(unknown)} categories of {name} were not in the training images, and score zero: "
                               f"{name_some([printable(n) for n in unknown], 3)}")  # fmt: skip

    def look(self, gt_boxes: bool) -> tuple[Results, np.ndarray | None]:
        """All detections, in every process, and where that is wanted the true boxes [I, 3]: ids of image and category, and 1
        where the box is classified right."""
        mine = range(len(self.images))[self.world.rows(len(self.images))]
        batches = [list(mine[k : k + self.config.batch_size]) for k in range(0, len(mine), self.config.batch_size)]
        parts, right = [], []
        name = self.file.parent.name
        with closing(self.images.reader(lambda k: batches[k], len(batches))) as read, \
                self.reporter.task(name, len(mine), "image") as task:  # fmt: skip
            for k, batch in enumerate(batches):
                samples = read(k)
                parts += [self._detections(*pair) for pair in zip(batch, self._answers(samples), strict=True)]
                if gt_boxes:
                    right += [self._right_at_true_boxes(*pair) for pair in zip(batch, samples, strict=True)]
                task.advance(len(batch))
        found = self._gathered(parts)
        if not gt_boxes:
            return found, None
        own = np.concatenate([np.empty((0, 3), np.int64), *right])
        return found, self.world.gather_rows(torch.from_numpy(own)).numpy()

    def _pixels(self, sample: Example) -> Tensor:
        return sample[0].to(self.runtime.device).float() / 255

    def _answers(self, samples: list[Example]) -> list[dict[str, Tensor]]:
        with torch.no_grad(), self.runtime.autocast():
            answers = detect(self.model, [self._pixels(sample) for sample in samples])
        return [{name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in answer.items()}
                for answer in answers]  # fmt: skip

    def _detections(self, i: int, answer: dict[str, Tensor]) -> Results:
        image = self.annotations.images[i]
        ids_N = self.ids_C[answer["labels"].numpy() - 1]
        kept_N = np.flatnonzero(ids_N >= 0)
        kept = torch.from_numpy(kept_N)
        boxes = answer["boxes"][kept]
        counts = None
        if "masks_28" in answer:
            counts = [rle["counts"] for rle in paste_rle(answer["masks_28"][kept], boxes, image.height, image.width)]
        boxes_N4 = boxes.double().numpy()
        boxes_N4 = np.concatenate([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], 1)
        scores_N, boxes_N4 = rounded(answer["scores"][kept].numpy(), boxes_N4)
        return Results(np.full(len(kept_N), image.id, np.int64), ids_N[kept_N], scores_N, boxes_N4, counts)

    def _gathered(self, parts: list[Results]) -> Results:
        def together(columns: list[np.ndarray], dtype: type, *shape: int) -> np.ndarray:
            own = np.concatenate([np.empty((0, *shape), dtype), *columns])
            return self.world.gather_rows(torch.from_numpy(own)).numpy()

        counts = None
        if self.header.architecture.masks:
            texts = [text for part in parts for text in part.counts or []]
            lengths = together([np.array([len(text) for text in texts], np.int64)], np.int64)
            letters = together([np.frombuffer("".join(texts).encode("ascii"), np.uint8)], np.uint8).tobytes().decode("ascii")
            ends = lengths.cumsum()
            counts = [letters[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
        return Results(together([p.image_ids for p in parts], np.int64), together([p.category_ids for p in parts], np.int64),
                       together([p.scores for p in parts], np.float64), together([p.boxes for p in parts], np.float64, 4),
                       counts)  # fmt: skip

    def _right_at_true_boxes(self, i: int, sample: Example) -> np.ndarray:
        """[I, 3]: ids of image and category, and 1 where the true box is classified right. Of the categories alone: background
        is none.

        Objects of categories that the detector does not know are wrong.
        """
        _, target = sample
        if not len(target["boxes"]):
            return np.empty((0, 3), np.int64)
        true_I = np.array([self.annotations.categories[label - 1].id for label in target["labels"].tolist()], np.int64)
        heads, device = self.model.roi_heads, self.runtime.device
        with torch.no_grad(), self.runtime.autocast():
            batch, [moved] = self.model.transform([self._pixels(sample)], [{"boxes": target["boxes"].to(device)}])
            features = self.model.backbone(batch.tensors)
            pooled = heads.box_roi_pool(features, [moved["boxes"]], batch.image_sizes)
            logits, _ = heads.box_predictor(heads.box_head(pooled))
        best_I = (logits if heads.sigmoid else logits[:, 1:]).float().argmax(1).cpu().numpy()
        images_I = np.full(len(true_I), self.annotations.images[i].id, np.int64)
        return np.stack([images_I, true_I, (self.ids_C[best_I] == true_I).astype(np.int64)], 1)
