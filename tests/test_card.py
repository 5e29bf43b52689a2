"""The model card: the run's own figures, no name that turns into markup, and nothing that balms does not know."""

import html
import random
import re
import shutil
import string

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt

from balms_cli.data.index import Split
from balms_cli.data.manifest import Manifest
from balms_cli.detection.card import detector_card
from balms_cli.engine.header import FORMAT, Header, read_header
from balms_cli.engine.run_dir import CARD, MODEL
from balms_cli.report.card import fenced, implied_prior, markdown, model_card
from balms_cli.stages import common

from .conftest import SMALL, invoke
from .detect_tools import tiny_header

FEW = ["--steps", "20", "--set", "meta_batch_size=16", "--batch-size", "16", "--set", "class_rows=8", "--views", "2"]


@pytest.fixture(scope="module")
def retrained(chain, tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "run"
    done = invoke("retrain", chain.pretrained, *FEW, "--meta-sampler", "--loss", "balanced", "--out", out, "-q")
    assert done.code == 0, done.err
    return out


def make(classes, counts, **changes):
    """Header and manifest of a run on these classes."""
    header = dict(
        format=FORMAT, created="2026-01-02T03:04:05+00:00", stage="pretrain", backbone="resnet8", feature_dim=64, image_size=16,
        classes=classes, class_counts=counts, mean=(0.5,) * 3, std=(0.2,) * 3, head="linear", loss="softmax",
        sampler="instance", implied_log_prior=np.log(counts).tolist(), recipe={"seed": 7},
        data={"name": "birds", "source": "photos", "images": sum(counts), "imbalance_factor": max(counts) / min(counts)},
        manifest="/nowhere", manifest_sha256="ab" * 32,
    )  # fmt: skip
    labels = np.repeat(np.arange(len(counts)), counts)
    splits = {"train": Split([f"{i}.jpg" for i in range(len(labels))], labels),
              "test": Split(["t.jpg"], np.zeros(1, np.int64))}  # fmt: skip
    source = {"kind": "folder", "name": "photos", "root": "/p"}
    manifest = Manifest("/nowhere", "birds", source, classes, counts, splits, "as is", None, max(counts) / min(counts), 3,
                        "ab" * 32, [640, 480], untested=classes[1:2])  # fmt: skip
    return Header(**{**header, **changes}), manifest


def card_of(classes, counts, recipe=None, made=None, parent=None, **changes) -> str:
    header, manifest = make(classes, counts, **changes)
    report = {"steps": 1234, "seconds": 5.5, "final_loss": 0.25, "seed": 7, "device": "cpu with 2 threads, fp32",
              "versions": {"balms": "9.8", "torch": "2.0"}}  # fmt: skip
    return model_card(header, report, recipe or {}, made or {}, manifest, 75290, parent)


def tables(card: str) -> list[list[list[str]]]:
    """Every table of the card as an independent reader of Markdown sees it: rows of plain text."""
    found, row, inside = [], [], False
    for token in MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2]):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            row = []
        elif token.type in ("td_open", "th_open"):
            inside = True
        elif token.type == "inline" and inside:
            assert all(child.type in ("text", "code_inline", "text_special") for child in token.children), token.content
            row.append("".join(child.content for child in token.children))
            inside = False
        elif token.type == "tr_close":
            found[-1].append(row)
    return found


class TestText:
    def test_any_text_comes_out_of_markdown_as_it_went_in(self):
        rng, reader = random.Random(0), MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
        samples = ["".join(rng.choices(string.punctuation * 3 + "ab1 &;", k=rng.randint(1, 12))) for _ in range(4000)]
        samples += ["<script>alert(1)</script>", "&lt;b&gt;", "![x](http://e.org/p.png)", "<http://e.org>", "a|b", "__x__"]
        for text in samples:
            wrapped = f"x {text} y"
            assert html.unescape(reader.renderInline(markdown(wrapped))) == wrapped
        assert markdown("two\nlines\x1b[31m") == "two\\\\nlines\\\\x1b\\[31m"

    def test_a_block_of_code_ends_where_it_should(self):
        for text in ("balms predict", "a ``` b", "```\n# title\n```", "`````"):
            (block,) = MarkdownIt("commonmark").parse(fenced(text, "sh"))
            assert block.type == "fence" and block.content == text + "\n"

    def test_hostile_class_names_stay_names(self):
        names = ["<img src=x onerror=alert(1)>", "a|b|c", "[click](http://evil.example)", "*bold* _em_ `c`", "# title", "$x^2$",
                 "Füchsin 狐", "www.evil.example"]  # fmt: skip
        card = card_of(names, [200, 150, 90, 50, 20, 19, 2, 1])
        assert [row[0] for row in tables(card)[2][1:]] == names
        body = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
        assert "<img" not in body and "<a " not in body and "<em>" not in body and "$x^2$" in html.unescape(body)


class TestContent:
    def test_figures_are_those_of_a_count_by_hand(self):
        card = card_of(["crow", "owl", "kiwi", "dodo"], [300, 101, 20, 1])
        facts, groups, classes, training = tables(card)[:4]
        assert dict(facts[1:]) == {
            "name": "birds", "source": "photos", "classes": "4", "training images": "422", "images a class": "300 down to 1",
            "imbalance factor": "300", "test images": "1", "drawn with seed": "3", "index sha256": "ab" * 32,
        }  # fmt: skip
        assert [row[1:] for row in groups[1:]] == [["2", "401"], ["1", "20"], ["1", "1"]]
        assert classes[1:] == [["crow", "300", "many"], ["owl", "101", "many"], ["kiwi", "20", "medium"], ["dodo", "1", "few"]]
        told = dict(training[1:])
        assert (told["steps"], told["seconds"], told["loss at the end"], told["seed"]) == ("1,234", "5.5", "0.25", "7")
        assert "75,290 parameters" in card and "balms 9.8" in card and "on 2026-01-02" in card
        assert "1 of 4 classes was learned from fewer than 20 images: dodo (1)." in card
        assert "No test images, so that nothing can be said of them: owl." in card and "640 x 480 px" in card

    def test_only_values_that_were_set_are_listed_with_who_set_them(self):
        recipe = {"lr": {"value": 0.05, "source": "flag"}, "momentum": {"value": 0.9, "source": "default"},
                  "augment": {"value": ["crop", "flip"], "source": "preset quick"},
                  "drw": {"value": True, "source": "file a|b.toml"}}  # fmt: skip
        card = card_of(["a", "b"], [30, 5], recipe, {"preset": "quick", "command": "balms pretrain 'my ``` data' --lr 0.05"})
        assert tables(card)[4][1:] == [["lr", "0.05", "flag"], ["augment", "crop, flip", "preset quick"],
                                       ["drw", "yes", "file a|b.toml"]]  # fmt: skip
        assert "````sh\nbalms pretrain 'my ``` data' --lr 0.05\n````" in card

    def test_what_raw_scores_mean_follows_from_the_prior(self):
        counts = [300, 30, 3]

        def of(prior, **changes):
            return implied_prior(make(["a", "b*", "c"], counts, implied_log_prior=[float(x) for x in prior], **changes)[0])

        log_n = np.log(counts)
        assert "as frequent as in training" in of(log_n) and "as frequent as in training" in of(log_n - 99)
        assert "meant for data where all classes are equally frequent; for other" in of([4.2] * 3)
        assert not any("right" in of(prior) for prior in (log_n, -log_n, [4.2] * 3, [1.0, 2.0, 0.5]))  # no promise
        assert "over-balanced" in of(-log_n)
        assert "from 60 % (b*) down to 10 % (c)" in of(np.log([0.3, 0.6, 0.1]))
        assert "no class prior that could be written down (focal loss" in of(log_n, loss="focal", prior_exact=False)
        assert r"60 % (b\*)" in card_of(["a", "b*", "c"], counts, implied_log_prior=np.log([0.3, 0.6, 0.1]).tolist())

    def test_no_test_figures_no_licence_and_no_path_of_the_machine_are_made_up(self):
        card = card_of(["a", "b"], [30, 5], made={"manifest": "/home/me/secret", "parent": "/home/me/run/model.safetensors"})
        assert "/home/me" not in card and "balms sets no licence" in card and "No test figures stand in this card" in card
        head = card.split("---\n")[1]
        assert head == ("library_name: balms\npipeline_tag: image-classification\ntags:\n- image-classification\n"
                        "- long-tailed-recognition\n")  # fmt: skip
        assert not re.search(r"accuracy\W+\d", card) and "license: " not in head

    def test_calibration_is_said_as_it_is(self):
        header, manifest = make(["a", "b"], [30, 5])
        assert "They are not calibrated" in model_card(header, {}, {}, {}, manifest, 1)
        manifest.splits["val"] = Split(["v.jpg"] * 6, np.zeros(6, np.int64))
        assert "on the 6 validation images" in model_card(header, {}, {}, {}, manifest, 1)

    def test_ten_thousand_classes_stay_readable(self):
        names = [f"class {i}" for i in range(10_000)]
        card = card_of(names, [max(1, 2000 // (i + 1)) for i in range(10_000)])
        assert len(tables(card)[2]) == 1 + 41 and len(card) < 10_000 and "and 9,8" in card

    def test_weights_from_elsewhere_are_named(self):
        parent, _ = make(["a", "b"], [9, 5], recipe={"weights": "imagenet"})
        card = card_of(["a", "b"], [9, 5], parent=parent)
        assert "began with weights from elsewhere (imagenet)" in card and "and of the initial weights" in card
        assert "from elsewhere" not in card_of(["a", "b"], [9, 5])


class TestRuns:
    def test_every_stage_that_trains_writes_one(self, chain, retrained):
        first, second = ((run / CARD).read_text() for run in (chain.pretrained, retrained))
        assert "Backbone and classifier were trained together." in first and "# resnet8 for photos" in first
        assert "Loss: Balanced Softmax. Batches: drawn by class sample rates that the Meta Sampler learned." in second
        assert "decoupled training" in second and "NeurIPS 2020" in second and "NeurIPS" not in first
        header = read_header(retrained / MODEL)
        rows = {row[0]: row[1:] for table in tables(second) for row in table}
        assert rows["started from sha256"] == [header.parent_sha256] and rows["index sha256"] == [header.manifest_sha256]
        assert rows["steps"] == ["20", "flag"] and rows["class_rows"] == ["8", "flag --set"] and rows["cat"] == ["32", "medium"]

    def test_its_python_runs_and_its_commands_exist(self, chain, retrained, capsys):
        card = (retrained / CARD).read_text()
        photo = next((chain.photos / "cat").iterdir())
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"RUN"', repr(str(retrained)))
        exec(code.replace('"photo.jpg"', repr(str(photo))), {})
        assert capsys.readouterr().out.startswith(f"{photo} (['")
        for line in re.search(r"## Use\n\n```sh\n(.*?)```", card, re.DOTALL)[1].splitlines():
            words = line.split("#")[0].replace("RUN", str(retrained)).replace("photos/", str(chain.photos)).split()
            assert words[0] == "balms" and invoke(*words[1:], "-q").code == 0

    def test_a_frozen_backbone_is_no_classifier(self, chain, tmp_path):
        done = invoke("pretrain", chain.manifest, "--frozen", *SMALL[:4], "--out", tmp_path / "f", "-q")
        card = (tmp_path / "f" / CARD).read_text()
        assert done.code == 0 and "pipeline_tag: image-feature-extraction" in card and "balms retrain RUN" in card
        assert "## What the scores mean" not in card and "Nothing was trained" in card

    def test_it_stands_before_the_model_and_goes_with_an_overwritten_run(self, chain, retrained, tmp_path, monkeypatch):
        shutil.copytree(retrained, tmp_path / "run")
        (tmp_path / "run" / CARD).write_text("old")
        (tmp_path / "run" / "temperature.json").write_text("old")

        def fail(path, model, header):
            assert "# resnet8" in (tmp_path / "run" / CARD).read_text()
            raise RuntimeError("stop")

        monkeypatch.setattr(common, "save_model", fail)
        assert invoke("retrain", chain.pretrained, *FEW, "--out", tmp_path / "run", "--overwrite", "-q").code == 1
        assert not (tmp_path / "run" / MODEL).exists() and not (tmp_path / "run" / "temperature.json").exists()

    @pytest.mark.parametrize(("options", "words"), [
        (["--classifier", "ncm"], "A nearest-class-mean classifier"), (["--classifier", "lws"], "(stage 1's, each row times"),
        (["--classifier", "tau-norm", "--tau-norm", "0.5"], "| tau | 0.5 |"),
        (["--meta-reweigher"], "weights that the Meta Reweigher learned"),
        (["--sampler", "class"], "every class as often as any other (class-balanced)"),
    ])  # fmt: skip
    def test_each_kind_of_classifier_is_called_by_its_name(self, chain, tmp_path, options, words):
        done = invoke("retrain", chain.pretrained, *FEW, *options, "--out", tmp_path / "r", "-q")
        assert done.code == 0 and words in (tmp_path / "r" / CARD).read_text(), done.err


def test_parameters_are_those_of_the_network(chain):
    from balms_cli.engine.checkpoint import load_model

    model, _ = load_model(chain.pretrained / MODEL)
    count = sum(torch.numel(p) for p in model.parameters())
    assert f"({count:,} parameters)" in (chain.pretrained / CARD).read_text()


def test_a_detector_counts_one_category_as_one():
    card = detector_card(tiny_header(1), {}, {}, "balms detect train")
    assert "for 1 category\n" in card and "looks for the 1 category above" in card and "1 categories" not in card
    assert "for 3 categories\n" in detector_card(tiny_header(3), {}, {}, "balms detect train")
