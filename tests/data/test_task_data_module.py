"""The data module serves a plain Trainer, and continues a run exactly where it stopped."""

from __future__ import annotations

import gzip
import json
import warnings
from types import SimpleNamespace

import lightning
import pytest
import torch
import transformers

from furina.data.items import overlap
from furina.data.module import TaskDataModule
from furina.data.protocols import get_protocol
from furina.data.tasks import get_task
from furina.errors import ConfigurationError, DataError


class Recorder(lightning.LightningModule):
    """A one-weight model that notes which tokens each step was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.seen, self.validated = [], 0

    def training_step(self, window, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for batch in window:
            self.manual_backward(self.weight * batch["attention_mask"].sum())
        optimizer.step()
        self.seen.append([batch["input_ids"].tolist() for batch in window])

    def validation_step(self, batch, index):
        self.validated += len(batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.fixture
def rows(tmp_path, write_rows):
    """Write 40 train questions of the public format and return their folder."""
    choices = {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
    made = [
        {"id": f"q{n}", "question": f"Case {'x' * (n % 7)} {n}?", "choices": choices}
        | {"answerKey": "ABC"[n % 3]}
        for n in range(40)
    ]
    write_rows(tmp_path / "arc_easy" / "train.jsonl.gz", made)
    return tmp_path


@pytest.fixture
def data(rows, tokenizer):
    def data(**options):
        defaults = {"batch_size": 4, "micro_batch_size": 2, "validation_size": 10, "seed": 5}
        return TaskDataModule(tokenizer, "arc_easy", data_dir=rows, **defaults | options)

    return data


def _fit(data, folder, max_steps, **options):
    model = Recorder()
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        num_sanity_val_steps=1,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*bottleneck.*")
        warnings.filterwarnings("ignore", ".*across ranks is zero.*")
        warnings.filterwarnings("ignore", ".*isinstance.treespec.*", FutureWarning)
        warnings.filterwarnings("error", ".*not resumable.*")
        warnings.filterwarnings("error", ".*IterableDataset.*")
        trainer.fit(model, datamodule=data, **options)
    trainer.save_checkpoint(folder / f"{max_steps}.ckpt")
    return model


def test_questions_are_split_encoded_and_disjoint(data):
    module = data()
    module.setup()
    train, validation = module.train_items["arc_easy"], module.validation_items["arc_easy"]
    assert (len(train), len(validation)) == (30, 10)
    assert overlap(train, validation) == []
    assert len(module.train_dataloader()) == 7


def test_setup_reads_once(data, monkeypatch):
    module = data()
    module.setup("fit")
    monkeypatch.setattr("furina.data.module.load_items", lambda *_: pytest.fail("read again"))
    module.setup("validate")


def test_a_trainer_sees_the_windows_of_its_steps_over_epochs(data, tmp_path):
    module = data()
    model = _fit(module, tmp_path, max_steps=16)
    batches = module.train_dataloader()
    assert model.seen == [
        [batch["input_ids"].tolist() for batch in batches.window(step)] for step in range(16)
    ]
    assert [len(window) for window in model.seen] == [2] * 16


def test_validation_covers_the_held_out_questions_once(data, tmp_path):
    model = _fit(data(), tmp_path, max_steps=7)
    assert model.validated == 10 + 2  # and one micro-batch in the sanity check


def test_validation_can_be_left_out(data, tmp_path):
    module = data(validation_size=0)
    assert _fit(module, tmp_path, max_steps=2).validated == 0
    assert module.val_dataloader() == []


@pytest.mark.parametrize("stop", [1, 4, 7, 10])
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(data, tmp_path, stop):
    whole = _fit(data(), tmp_path, max_steps=16)
    _fit(data(), tmp_path, max_steps=stop)
    rest = _fit(data(), tmp_path, max_steps=16, ckpt_path=tmp_path / f"{stop}.ckpt")
    assert rest.seen == whole.seen[stop:]


def test_the_seed_decides_the_split_and_the_order(data):
    modules = [data(seed=seed) for seed in (5, 5, 6)]
    for module in modules:
        module.setup()
    first, same, other = ([q.id for q in m.validation_items["arc_easy"]] for m in modules)
    assert first == same != other


def test_training_reads_the_text_that_evaluation_asks(data, tokenizer):
    module = data(protocol="label")
    module.setup()
    window = module.train_dataloader().window(0)
    task, label = get_task("arc_easy"), get_protocol("label")
    texts = {
        label.context(task, question) + label.target(task, question)
        for question in module.train_items["arc_easy"]
    }
    for batch in window:
        for ids, mask, labels in zip(*batch.values(), strict=True):
            text = tokenizer.decode(ids[mask.bool()])
            assert text in texts
            assert text.endswith(tokenizer.decode(labels[labels != -100]))


def test_a_tokenizer_without_a_pad_token_is_refused(rows, tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ConfigurationError, match=r"no pad token: set tokenizer.pad_token"):
        TaskDataModule(tokenizer, "arc_easy", data_dir=rows)


def test_unknown_names_are_refused_at_once(tokenizer):
    with pytest.raises(ConfigurationError, match="no task 'arc'"):
        TaskDataModule(tokenizer, "arc")
    with pytest.raises(ConfigurationError, match=r"no protocol 'labels'. Did you mean 'label'"):
        TaskDataModule(tokenizer, "arc_easy", "labels")
    with pytest.raises(ConfigurationError, match="lm_eval only evaluates: train under another"):
        TaskDataModule(tokenizer, "arc_easy", "lm_eval")
    with pytest.raises(ConfigurationError, match="cot cannot ask arc_easy: it is not a mathem"):
        TaskDataModule(tokenizer, "arc_easy", "cot")


@pytest.fixture
def mixed(rows, tokenizer, write_rows):
    choices = {"text": ["up", "down"], "label": ["A", "B"]}
    made = [
        {"id": f"o{n}", "question_stem": f"Other {n}?", "choices": choices, "answerKey": "A"}
        for n in range(20)
    ]
    write_rows(rows / "openbookqa" / "train.jsonl.gz", made)

    def mixed(mixture, **options):
        module = TaskDataModule(
            tokenizer, mixture, data_dir=rows, batch_size=4, validation_size=10, **options
        )
        module.setup()
        return module

    return mixed


def test_a_mixture_holds_each_tasks_rows_by_weight_and_cap(mixed):
    module = mixed({"arc_easy": {"cap": 12, "weight": 2}, "openbookqa": {"task_type": 1}})
    assert {name: len(rows) for name, rows in module.train_items.items()} == {
        "arc_easy": 12,
        "openbookqa": 15,
    }
    assert {name: len(rows) for name, rows in module.validation_items.items()} == {
        "arc_easy": 5,
        "openbookqa": 5,
    }
    batches = module.train_dataloader()
    assert len(batches) == (2 * 12 + 15) // 4
    types = torch.cat([b["task_types"] for s in range(len(batches)) for b in batches.window(s)])
    assert set(types.tolist()) == {0, 1}
    half = mixed({"arc_easy": {"weight": 0.5}, "openbookqa": None})
    assert len(half.train_dataloader().examples) == round(0.5 * 35) + 15


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"arc_easy": {"wait": 1}}, "unknown option 'wait'. Did you mean 'weight'"),
        ({"arc_easy": {"weight": 0}}, "weight=0 of a mixture's task must be positive"),
        ({"arc_easy": {"weight": "two"}}, "has weight='two': give a number"),
        ({"arc_easy": {"cap": 1.5}}, "has cap=1.5: give a number"),
        ({"arc_easy": {"cap": 0}}, "cap=0 of a mixture's task must be at least 1"),
        ({"arc_easy": {"task_type": 2}}, "task_type=2 of a mixture must be 0 or 1"),
        ({"arc_easy": 3}, "arc_easy must hold options such as weight and cap, not 3"),
        ({"arc_easi": {}}, "no task 'arc_easi'. Did you mean 'arc_easy'"),
        ({}, "mixture of no tasks"),
    ],
)
def test_a_mixture_that_cannot_be_sampled_is_refused(tokenizer, mixture, message):
    with pytest.raises(ConfigurationError, match=message):
        TaskDataModule(tokenizer, mixture)


def test_tokens_beyond_the_models_embeddings_are_refused_before_the_first_step(data):
    module, embedding = data(), torch.nn.Embedding(200, 2)
    backbone = torch.nn.Module()
    backbone.get_input_embeddings = lambda: embedding
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(model=backbone))
    with pytest.raises(
        ConfigurationError, match=r"is number \d+, and the model has 200 embeddings"
    ):
        module.setup("fit")
    embedding.weight = torch.nn.Parameter(torch.zeros(512, 2))
    module = data()
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(model=backbone))
    module.setup("fit")
    module = data()
    module.pad_id = 512  # a padding token that was added, and has no row
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(model=backbone))
    with pytest.raises(ConfigurationError, match="is number 512"):
        module.setup("fit")


@pytest.mark.parametrize(("kind", "learned"), [("OPT", True), ("Llama", False)])
def test_a_row_longer_than_the_models_learned_positions_is_refused(data, kind, learned):
    sizes = {"hidden_size": 8, "ffn_dim": 8, "intermediate_size": 8, "word_embed_proj_dim": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=384, max_position_embeddings=12, **sizes, **heads
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    module = data()
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(model=model))
    if not learned:
        module.setup("fit")
        return
    with pytest.raises(
        ConfigurationError, match=r"has \d+ tokens, and the model 12 positions: set"
    ):
        module.setup("fit")
    module = data(max_length=12)
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(model=model))
    module.setup("fit")


@pytest.mark.parametrize("question", [None, " ", "half \ud800"])
def test_a_spoilt_row_is_named_and_nothing_is_trained(rows, tokenizer, question):
    row = {"id": "1", "question": question, "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    path = rows / "arc_easy" / "train.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({**row, "answerKey": "A"}).encode()))
    module = TaskDataModule(tokenizer, "arc_easy", batch_size=1, data_dir=rows, seed=0)
    with pytest.raises(DataError, match=r"^Line 1 of .*train\.jsonl\.gz is not as expected"):
        module.setup("fit")


def test_lightning_finds_no_validation_rows_to_share_out_among_ranks(data):
    """Its sampler for ranks gives some rows twice where their number does not divide the rows."""
    from torch.utils.data import DataLoader

    module = data()
    module.setup()
    (loader,) = module.val_dataloader()
    assert not isinstance(loader, DataLoader)
    assert sum(len(batch["input_ids"]) for batch in loader) == len(module._validation)
    assert len(loader) == len(list(loader))
