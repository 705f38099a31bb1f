"""Batches are a pure function of seed and step, and hold each row once, answer and all."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from furina.backbones.tiny import tiny_tokenizer
from furina.data.batches import Example, StepBatches, collate, encode_examples
from furina.data.encoding import encode_pair
from furina.data.protocols import get_protocol
from furina.data.tasks import get_task
from furina.errors import ConfigurationError

PAD = 0
TASK, TEXT = get_task("arc_easy"), get_protocol("text")


def _examples(count):
    return [Example(tuple([100 + n] * (3 + n % 13)), 1 + n % 2) for n in range(count)]


def _batches(count=50, batch_size=8, **options):
    return StepBatches(_examples(count), batch_size, PAD, **{"seed": 3} | options)


def _rows(window):
    """List the example numbers of a window; every token of example n is 100 + n."""
    return [int(row[0]) - 100 for batch in window for row in batch["input_ids"]]


def _equal(window, other):
    return len(window) == len(other) and all(
        torch.equal(batch[key], twin[key])
        for batch, twin in zip(window, other, strict=True)
        for key in batch | twin
    )


def _encode(tokenizer, questions, max_length=512, protocol=TEXT, **options):
    return encode_examples(tokenizer, TASK, questions, protocol, max_length, **options)


def test_an_example_is_the_encoded_pair(own_questions, tokenizer):
    examples = _encode(tokenizer, own_questions)
    for example, question in zip(examples, own_questions, strict=True):
        context, answer = encode_pair(tokenizer, *TEXT.pair(TASK, question))
        assert example == Example(tuple(context + answer), len(answer))


def test_a_protocol_that_ends_appends_the_end_and_may_train_on_the_prompt(own_questions, tokenizer):
    clean, published = (get_protocol(f"generate_{name}") for name in ("clean", "v1"))
    for example in _encode(tokenizer, own_questions, protocol=clean):
        assert example.input_ids[-1] == tokenizer.eos_token_id
        assert example.answer_length < len(example.input_ids)
    for example in _encode(tokenizer, own_questions, protocol=published):
        assert example.input_ids[-1] == tokenizer.eos_token_id
        assert example.answer_length == len(example.input_ids)


def test_an_end_that_the_tokenizer_does_not_have_is_an_error(own_questions, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ConfigurationError, match=r"set tokenizer.eos_token"):
        _encode(tokenizer, own_questions, protocol=get_protocol("generate_clean"))


def test_truncation_drops_the_start_of_the_context_and_is_counted(own_questions, tokenizer):
    whole = _encode(tokenizer, own_questions)
    longest = max(len(example.input_ids) for example in whole)
    with pytest.warns(UserWarning, match=f"1 of {len(whole)} examples of arc_easy are longer than"):
        cut = _encode(tokenizer, own_questions, longest - 1)
    assert [c.answer_length for c in cut] == [w.answer_length for w in whole]
    assert [c.input_ids for c in cut] == [w.input_ids[-(longest - 1) :] for w in whole]


def test_an_answer_is_never_cut(own_questions, tokenizer):
    answers = [example.answer_length for example in _encode(tokenizer, own_questions)]
    longest = max(answers)
    kept = [length for length in answers if length < longest]
    with pytest.warns(UserWarning) as caught:
        examples = _encode(tokenizer, own_questions, longest)
    assert [example.answer_length for example in examples] == kept
    said = f"{len(answers) - len(kept)} of {len(answers)} examples of arc_easy have an answer that"
    assert any(str(warning.message).startswith(said) for warning in caught)
    with pytest.raises(ConfigurationError, match=r"max_length=1 is too short: every answer"):
        _encode(tokenizer, own_questions, 1)


def test_a_mixtures_rows_carry_their_task_type_and_others_none():
    typed = collate([Example((5, 6), 1, task_type=1), Example((7, 8), 1, task_type=0)], PAD)
    assert typed["task_types"].tolist() == [1, 0]
    assert "task_types" not in collate([Example((5, 6), 1)], PAD)


def test_a_micro_batch_masks_padding_and_labels_only_the_answer():
    batch = collate([Example((5, 6, 7, 8), 2), Example((9, 10), 1)], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0, 0, 0], [9, 10, 0, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 2 + [0] * 6]
    ignored = [-100] * 4
    assert batch["labels"].tolist() == [
        [-100, -100, 7, 8, *ignored],
        [-100, 10, -100, -100, *ignored],
    ]


@pytest.mark.parametrize(("length", "width"), [(7, 8), (8, 8), (9, 16)])
def test_width_is_the_longest_rounded_up_to_a_multiple_of_eight(length, width):
    batch = collate([Example((1,) * length, 1), Example((1, 2), 1)], PAD)
    assert {tensor.shape for tensor in batch.values()} == {(2, width)}


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(8, 60),
    size=st.integers(1, 8),
    micro=st.integers(1, 9),
    bucket=st.integers(1, 5),
    seed=st.integers(),
)
def test_an_epoch_holds_each_row_at_most_once_and_all_that_fit(count, size, micro, bucket, seed):
    batches = _batches(count, size, micro_batch_size=micro, bucket_steps=bucket, seed=seed)
    windows = list(batches)
    rows = [row for window in windows for row in _rows(window)]
    assert len(windows) == len(batches) == count // size
    assert len(rows) == len(set(rows)) == count // size * size
    assert all(len(batch["labels"]) <= micro for window in windows for batch in window)


def test_a_bucket_holds_the_rows_of_its_steps_each_of_like_length_in_random_order():
    plain, sorted_ = _batches(96), _batches(96, bucket_steps=4)
    starts = []
    for first in range(0, 12, 4):
        ours = [_rows(sorted_.window(step)) for step in range(first, first + 4)]
        shuffled = [_rows(plain.window(step)) for step in range(first, first + 4)]
        assert sorted(chain(*ours)) == sorted(chain(*shuffled))
        lengths = sorted(sorted(3 + row % 13 for row in rows) for rows in ours)
        assert list(chain(*lengths)) == sorted(chain(*lengths))
        starts.append([3 + rows[0] % 13 for rows in ours])
    assert any(start != sorted(start) for start in starts)


@pytest.mark.parametrize("bucket_steps", [1, 4])
def test_a_step_does_not_depend_on_what_was_read_before(bucket_steps):
    fresh, used = _batches(bucket_steps=bucket_steps), _batches(bucket_steps=bucket_steps)
    for step in (17, 3, 0, 30, 17):
        used.window(step)
    assert all(_equal(fresh.window(step), used.window(step)) for step in range(20))


def test_steps_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = _batches().window(4)
    torch.manual_seed(2)
    assert _equal(first, _batches().window(4))
    state = torch.get_rng_state()
    _batches().window(5)
    assert torch.equal(state, torch.get_rng_state())


def test_epochs_and_seeds_differ():
    orders = [
        [row for step in range(6) for row in _rows(_batches(seed=seed).window(6 * epoch + step))]
        for seed in (3, 4)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, 13])
def test_an_iteration_begins_at_the_step_it_is_told_and_ends_with_the_epoch(done):
    batches = _batches(start_step=lambda: done)
    windows = list(batches)
    assert len(windows) == len(batches) - done % len(batches)
    assert all(_equal(w, batches.window(done + n)) for n, w in enumerate(windows))


def test_the_step_is_asked_for_when_the_first_window_is_wanted():
    done = 0
    batches = _batches(start_step=lambda: done)
    iterator = iter(batches)
    done = 4
    assert _equal(next(iterator), batches.window(4))


def test_micro_batches_hold_the_rows_of_the_whole_step():
    whole = _batches(batch_size=8).window(2)
    cut = _batches(batch_size=8, micro_batch_size=3).window(2)
    assert [len(batch["labels"]) for batch in cut] == [3, 3, 2]
    assert _rows(cut) == _rows(whole)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_step_without_loss_and_in_equal_parts(world_size):
    alone = _batches(micro_batch_size=2 * world_size).window(2)
    parts = [
        _batches(micro_batch_size=2, rank=rank, world_size=world_size).window(2)
        for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {len(alone)}
    for index, batch in enumerate(alone):
        together = sorted(row for part in parts for row in _rows([part[index]]))
        assert together == sorted(_rows([batch]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "must be at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
        ({"micro_batch_size": 1.5}, "micro_batch_size=1.5 must be at least 1, and a whole number"),
        ({"bucket_steps": 0}, "bucket_steps=0 must be at least 1"),
        ({"batch_size": 51}, "batch_size=51 is more than the 50 train questions"),
        ({"world_size": 3}, "batch_size=8 cannot be shared evenly by 3 processes"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        _batches(**options)


def test_the_tiny_tokenizer_pads_with_its_own_token():
    assert tiny_tokenizer().pad_token_id == PAD


def test_batches_are_made_on_the_cpu_whatever_the_default_device() -> None:
    examples = [Example(tuple(range(3, 9 + n)), 2, task_type=0) for n in range(8)]
    windows = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            batches = StepBatches(examples, 4, 0, seed=0, bucket_steps=2)
            windows[device] = batches.window(0) + batches.window(1)
    for found, expected in zip(windows["meta"], windows["cpu"], strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
